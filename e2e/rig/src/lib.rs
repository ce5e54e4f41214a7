//! What the small programs of the testbed share with each other and with the tests.
//!
//! | module | holds |
//! |---|---|
//! | [`archive`] | the OCI image archive, as bytes |
//! | [`ping`] | what `probe ping` counts and prints |
//! | [`reach`] | what `probe serve` answers and `probe reach` prints |

pub mod archive;
pub mod ping;
pub mod reach;
