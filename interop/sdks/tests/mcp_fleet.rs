//! The program `mcp_fleet`, briefly.

use std::process::Command;

/// Sixteen processes share one login while processes are killed: no refresh token is reused, and no call fails.
#[test]
fn killed_processes_keep_login() {
    let status = Command::new(env!("CARGO_BIN_EXE_mcp_fleet")).arg("--brief").status().expect("the program");
    assert!(status.success(), "{status}");
}

/// The programs have the client of the page `guide::mcp`, so their figures are those of the recipe.
#[test]
fn program_has_recipe() {
    let page = include_str!("../../../src/guide/mcp.md");
    let program = include_str!("../src/mcp_client.rs");
    let start = page.find("type Headers =").expect("the recipe");
    let end = page.find("let (url, issuer, client_id)").expect("the recipe's end");
    assert!(program.contains(page[start..end].trim()), "the recipe and the program differ");
}
