#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| plat_cni_fuzz::blocks::check(input));
