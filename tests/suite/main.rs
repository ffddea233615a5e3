//! The tests that need no process of their own, in one program.

#[path = "../support/mod.rs"]
mod support;

mod always_fresh;
mod auth_endpoint;
mod cancellation;
mod catalogue;
mod challenge;
mod constant_hint;
mod delegated_upload;
mod events;
mod fleet;
mod fleet_model;
mod fuzz_corpus;
mod http2;
mod interruptions;
mod links;
mod login;
mod login_faults;
mod login_outages;
mod login_owner;
mod login_pace;
mod model;
mod modules;
mod oauth2;
mod origins;
mod outages;
mod paced_challenges;
mod per_request;
mod permits;
mod redirected_challenges;
mod replay;
mod runtime_option;
mod runtimes;
mod secrets;
mod signing_keys;
mod single_flight;
mod sources;
mod spawned_client;
mod step_up;
mod tenant_limits;
mod tenants;
mod token_client;
mod token_endpoint;
mod tower_contract;
mod validation;
