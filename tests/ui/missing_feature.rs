//! A name behind a feature that is not on.

use tower_bearer::ReqwestService;

fn main() {
    let _ = ReqwestService::new;
}
