//! What the small programs of the testbed share with each other and with the tests.
//!
//! | module | holds |
//! |---|---|
//! | [`archive`] | the OCI image archive, as bytes |
//! | [`figures`] | benchmark figures and their table |
//! | [`ping`] | what `probe ping` counts and prints |
//! | [`reach`] | what `probe serve` answers and `probe reach` prints |

pub mod archive;
pub mod figures;
pub mod ping;
pub mod reach;
