//! The probe packet, over UDP: a request padded to the size that is asked about, and an answer of 16 bytes.
//!
//! | bytes | meaning |
//! |---|---|
//! | 0–3 | `PLTP` |
//! | 4 | version, 1; later ones keep these 16 bytes, so that agents of two versions answer each other |
//! | 5 | 1 request, 2 answer |
//! | 6–7 | length of the request's payload, big endian |
//! | 8–15 | nonce of the request, which the answer repeats |
//!
//! An answer is never longer than its request, so nobody is made to amplify anything.

use plat_crds::block::Family;

/// Length of an answer, and of the smallest request.
pub const HEADER: usize = 16;
const MAGIC: [u8; 4] = *b"PLTP";
const VERSION: u8 = 1;
const REQUEST: u8 = 1;
const ANSWER: u8 = 2;

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What the answer must repeat; not to be guessed by others.
    pub nonce: u64,
    /// Length of the UDP payload in bytes.
    pub length: u16,
}

impl Request {
    /// The request that makes an IP packet of `size` bytes, or the smallest there is.
    pub fn of_size(family: Family, size: u32, nonce: u64) -> Request {
        let payload = size.saturating_sub(headers(family));
        let length = u16::try_from(payload).unwrap_or(u16::MAX).max(16);
        Request { nonce, length }
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.header(REQUEST).to_vec();
        bytes.resize(usize::from(self.length).max(HEADER), 0);
        bytes
    }

    /// Reads what a peer sent; `None` if it is no request.
    pub fn decode(bytes: &[u8]) -> Option<Request> {
        let request = read(bytes, REQUEST)?;
        (usize::from(request.length) == bytes.len()).then_some(request)
    }

    /// The bytes of its answer.
    pub fn answer(&self) -> [u8; HEADER] {
        self.header(ANSWER)
    }

    /// Whether these bytes answer it.
    pub fn is_answered_by(&self, bytes: &[u8]) -> bool {
        bytes.len() == HEADER && read(bytes, ANSWER) == Some(*self)
    }

    fn header(&self, kind: u8) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&MAGIC);
        header[4] = VERSION;
        header[5] = kind;
        header[6..8].copy_from_slice(&self.length.to_be_bytes());
        header[8..].copy_from_slice(&self.nonce.to_be_bytes());
        header
    }
}

fn read(bytes: &[u8], kind: u8) -> Option<Request> {
    let (header, _) = bytes.split_first_chunk::<HEADER>()?;
    let [a, b, c, d, version, is, high, low, nonce @ ..] = *header;
    let ours = [a, b, c, d] == MAGIC && version >= VERSION && is == kind;
    ours.then(|| Request { nonce: u64::from_be_bytes(nonce), length: u16::from_be_bytes([high, low]) })
}

/// IP and UDP headers (RFC 791, RFC 8200, RFC 768).
fn headers(family: Family) -> u32 {
    match family {
        Family::IPv4 => 20 + 8,
        Family::IPv6 => 40 + 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_fills_the_packet_that_is_asked_about() {
        for (family, size, payload) in [
            (Family::IPv4, 1500, 1472),
            (Family::IPv6, 1500, 1452),
            (Family::IPv4, 0, 16),
            (Family::IPv6, 1280, 1232),
            (Family::IPv4, u32::MAX, 65_535),
        ] {
            assert_eq!(Request::of_size(family, size, 7).encode().len(), payload, "{family} {size}");
        }
    }

    #[test]
    fn a_request_that_was_cut_is_none_and_a_later_version_is_answered() {
        let request = Request { nonce: 7, length: 100 };
        let mut bytes = request.encode();
        bytes[4] = 9;
        assert_eq!(Request::decode(&bytes), Some(request));
        bytes.pop();
        assert_eq!(Request::decode(&bytes), None);
        assert_eq!(
            Request::decode(&request.answer()),
            None,
            "an answer is no request: nobody answers answers"
        );
    }

    proptest! {
        #[test]
        fn what_is_sent_is_read_and_its_answer_fits_it_alone(nonce: u64, other: u64, length in 16u16..) {
            let request = Request { nonce, length };
            let bytes = request.encode();
            prop_assert_eq!(Request::decode(&bytes), Some(request));
            prop_assert!(request.answer().len() <= bytes.len());
            prop_assert!(request.is_answered_by(&request.answer()));
            let another = Request { nonce: other, length };
            prop_assert_eq!(another.is_answered_by(&request.answer()), nonce == other);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = Request::decode(&bytes);
            let _ = Request { nonce: 1, length: 16 }.is_answered_by(&bytes);
        }
    }
}
