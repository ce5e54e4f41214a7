//! The CNI binary.
fn main() {}
