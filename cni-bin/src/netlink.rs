//! Netlink, the kernel's configuration protocol (RFC 3549), as far as Plat needs it: a message builder, an
//! attribute reader and a blocking socket that reads every answer.
//!
//! Nothing here knows what a message means: [`crate::link`] speaks rtnetlink with it, [`crate::nft`]
//! nftables. Messages carry a few words about what they do, so that an error names the step that failed.
//! Sending is synchronous in the kernel: when `send` returns, the answer is already queued.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::net::sockopt::{Timeout, set_socket_send_buffer_size_force, set_socket_timeout};

use crate::fail;

/// Request flag: this is a request (`NLM_F_REQUEST`).
pub const REQUEST: u16 = 0x01;
/// Request flag: answer also when all is well (`NLM_F_ACK`).
pub const ACK: u16 = 0x04;
/// Request flag: send the new object back (`NLM_F_ECHO`; rtnetlink honours it since kernel 6.2).
pub const ECHO: u16 = 0x08;
/// Get flag: all objects (`NLM_F_DUMP`).
pub const DUMP: u16 = 0x300;
/// New flag: replace what is there (`NLM_F_REPLACE`).
pub const REPLACE: u16 = 0x100;
/// New flag: fail with `EEXIST` if it is there (`NLM_F_EXCL`).
pub const EXCL: u16 = 0x200;
/// New flag: create it (`NLM_F_CREATE`).
pub const CREATE: u16 = 0x400;
/// New flag: put it at the end (`NLM_F_APPEND`).
pub const APPEND: u16 = 0x800;

const DUMP_INTERRUPTED: u16 = 0x10;
const CAPPED: u16 = 0x100;
const ACK_TLVS: u16 = 0x200;

const MSG_NOOP: u16 = 1;
const MSG_ERROR: u16 = 2;
const MSG_DONE: u16 = 3;

const HEADER: usize = 16;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
/// `NLMSGERR_ATTR_MSG`: the kernel's own words about a refusal.
const ERROR_TEXT: u16 = 1;

/// The kernel sizes the pieces of a dump after the reader's buffer, up to 32 KiB.
const BUFFER: usize = 32 * 1024;
/// A dump that other changes interrupt is started again, at most so many times.
const DUMP_TRIES: u32 = 50;
/// Answers are queued before `send` returns; waiting longer than this for one is a fault, not patience.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a netlink request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a message.
    #[error("{what}: {}{}", describe(*errno), hint(detail))]
    Refused {
        /// What the message was to do.
        what: String,
        /// The kernel's error number.
        errno: Errno,
        /// The kernel's own words, if it had any.
        detail: String,
    },
    /// The socket failed.
    #[error("{what}: netlink socket: {}", describe(*errno))]
    Socket {
        /// What was going on.
        what: String,
        /// The system's error number.
        errno: Errno,
    },
    /// A message has an attribute beyond the 65,535 bytes that netlink can express.
    #[error("{what}: does not fit into a netlink attribute")]
    Oversized {
        /// What the message was to do.
        what: String,
    },
    /// The kernel sent something that is not netlink.
    #[error("{what}: the kernel's answer cannot be read")]
    Malformed {
        /// What was asked.
        what: String,
    },
    /// A list changed under every one of many readings.
    #[error("{what}: interrupted by other changes {DUMP_TRIES} times in a row")]
    Interrupted {
        /// What was asked.
        what: String,
    },
}

/// The system's words for an error number, in lower case and without the number. What the kernel does not
/// know is an object here, never a file; and runtimes take "no such file or directory" in the error of a
/// DEL for success.
fn describe(errno: Errno) -> String {
    if errno == Errno::NOENT {
        return "does not exist".to_owned();
    }
    let text = std::io::Error::from_raw_os_error(errno.raw_os_error()).to_string().to_lowercase();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

fn hint(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(" ({detail})") }
}

impl Error {
    /// The error number with which the kernel refused; `None` if it did not come to that.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

/// "Already so" is success: turns `EEXIST` of an exclusive create into `Ok(false)`.
pub fn created(result: Result<(), Error>) -> Result<bool, Error> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(Errno::EXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// "Already gone" is success: turns the errors with which the kernel says that the object of a delete
/// does not exist into `Ok(false)`.
pub fn deleted(result: Result<(), Error>) -> Result<bool, Error> {
    match result {
        Ok(()) => Ok(true),
        Err(error) => match error.errno() {
            Some(Errno::NODEV | Errno::SRCH | Errno::ADDRNOTAVAIL | Errno::NOENT) => Ok(false),
            _ => Err(error),
        },
    }
}

/// The bytes of an address in network order.
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// The address of these bytes in network order.
pub fn to_address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
    v4().or_else(|| <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from))
}

/// A message under construction. Attributes are appended in order; lengths and padding are kept right.
#[derive(Clone)]
pub struct Message {
    bytes: Vec<u8>,
    what: Cow<'static, str>,
    oversized: bool,
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Message({}, {} bytes)", self.what, self.bytes.len())
    }
}

impl Message {
    /// A message of that type: `flags` besides [`REQUEST`], the family's fixed `header` (such as
    /// `ifinfomsg`), and `what` it does, for errors.
    pub fn new(kind: u16, flags: u16, header: &[u8], what: impl Into<Cow<'static, str>>) -> Message {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(header);
        let mut message = Message { bytes, what: what.into(), oversized: false };
        message.pad();
        message
    }

    /// What the message does.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Appends an attribute.
    pub fn attr(&mut self, kind: u16, value: &[u8]) -> &mut Message {
        let Ok(length) = u16::try_from(value.len() + 4) else {
            self.oversized = true;
            return self;
        };
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
        self
    }

    /// Appends a byte.
    pub fn attr_u8(&mut self, kind: u16, value: u8) -> &mut Message {
        self.attr(kind, &[value])
    }

    /// Appends a number in the machine's byte order (rtnetlink).
    pub fn attr_u32(&mut self, kind: u16, value: u32) -> &mut Message {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Appends a number in network byte order (nftables).
    pub fn attr_be32(&mut self, kind: u16, value: u32) -> &mut Message {
        self.attr(kind, &value.to_be_bytes())
    }

    /// Appends a text with the zero byte at its end that the kernel expects.
    pub fn attr_str(&mut self, kind: u16, value: &str) -> &mut Message {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// Appends an attribute that holds what `fill` appends.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Message)) -> &mut Message {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        fill(self);
        match u16::try_from(self.bytes.len() - start) {
            Ok(length) => self.write(start, &length.to_ne_bytes()),
            Err(_) => self.oversized = true,
        }
        self
    }

    /// Appends bytes that are not an attribute (a fixed header inside a nest).
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Message {
        self.bytes.extend_from_slice(bytes);
        self.pad();
        self
    }

    /// Number of bytes so far, for callers that split long lists over messages.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing but the header is there.
    pub fn is_empty(&self) -> bool {
        self.bytes.len() <= HEADER
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn write(&mut self, at: usize, value: &[u8]) {
        if let Some(place) = self.bytes.get_mut(at..at + value.len()) {
            place.copy_from_slice(value);
        }
    }

    /// The message as it goes to the kernel, without sequence number.
    pub fn encode(self) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        self.finish(0, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Writes length, additional flags and sequence number, and appends the whole to `buffer`.
    fn finish(mut self, flags: u16, sequence: u32, buffer: &mut Vec<u8>) -> Result<(), Error> {
        let length = u32::try_from(self.bytes.len()).ok().filter(|_| !self.oversized);
        let Some(length) = length else {
            return Err(Error::Oversized { what: self.what.into_owned() });
        };
        self.write(0, &length.to_ne_bytes());
        let flags = number::<2>(&self.bytes, 6).map_or(flags, |b| u16::from_ne_bytes(b) | flags);
        self.write(6, &flags.to_ne_bytes());
        self.write(8, &sequence.to_ne_bytes());
        buffer.extend_from_slice(&self.bytes);
        Ok(())
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// One attribute of a received message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attribute<'a> {
    /// Its type, without the flag bits.
    pub kind: u16,
    /// Its value.
    pub value: &'a [u8],
}

impl<'a> Attribute<'a> {
    /// A number in the machine's byte order.
    pub fn u32(&self) -> Option<u32> {
        number(self.value, 0).map(u32::from_ne_bytes)
    }

    /// A number in network byte order.
    pub fn be32(&self) -> Option<u32> {
        number(self.value, 0).map(u32::from_be_bytes)
    }

    /// A long number in network byte order.
    pub fn be64(&self) -> Option<u64> {
        number(self.value, 0).map(u64::from_be_bytes)
    }

    /// A byte.
    pub fn u8(&self) -> Option<u8> {
        self.value.first().copied()
    }

    /// A text, without the zero byte at its end. Bytes that are not UTF-8 are replaced.
    pub fn text(&self) -> Cow<'a, str> {
        let end = self.value.iter().position(|&b| b == 0).unwrap_or(self.value.len());
        String::from_utf8_lossy(self.value.get(..end).unwrap_or_default())
    }

    /// The attributes inside.
    pub fn nested(&self) -> Attributes<'a> {
        Attributes { rest: self.value }
    }
}

/// Iterates over attributes; ends at the first one that is cut off.
#[derive(Clone, Debug)]
pub struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Attributes<'a> {
    /// The attributes behind a message's fixed header of `header` bytes.
    pub fn behind(payload: &'a [u8], header: usize) -> Attributes<'a> {
        Attributes { rest: payload.get(header.next_multiple_of(4)..).unwrap_or_default() }
    }

    /// The first attribute of that type.
    pub fn find(&self, kind: u16) -> Option<Attribute<'a>> {
        Iterator::find(&mut self.clone(), |a| a.kind == kind)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let length = usize::from(u16::from_ne_bytes(number(self.rest, 0)?));
        let kind = u16::from_ne_bytes(number(self.rest, 2)?) & TYPE_MASK;
        let value = self.rest.get(4..length)?;
        self.rest = self.rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Attribute { kind, value })
    }
}

/// One received message.
#[derive(Clone, Copy, Debug)]
pub struct Received<'a> {
    /// Its type.
    pub kind: u16,
    flags: u16,
    sequence: u32,
    /// What follows the netlink header.
    pub payload: &'a [u8],
}

/// Splits what one `recv` brought into messages; ends at the first one that is cut off. Pure.
pub fn split(mut bytes: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(number(bytes, 0)?)).ok()?;
        let received = Received {
            kind: u16::from_ne_bytes(number(bytes, 4)?),
            flags: u16::from_ne_bytes(number(bytes, 6)?),
            sequence: u32::from_ne_bytes(number(bytes, 8)?),
            payload: bytes.get(HEADER..length)?,
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(received)
    })
}

/// What the kernel said about one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Why it refused; `None` if it did not.
    pub errno: Option<Errno>,
    /// Its own words about that, if it had any.
    pub detail: String,
}

/// Reads `nlmsgerr`: the error number (negative; 0 is success), then the request's header (or, unless capped, the request), then
/// the kernel's words. Pure.
pub fn read_answer(received: &Received<'_>) -> Option<Answer> {
    let code = i32::from_ne_bytes(number(received.payload, 0)?);
    // Beyond that range the kernel has no error numbers, and rustix no place for one.
    let errno = match code {
        0 => None,
        -4095..=-1 => Some(Errno::from_raw_os_error(-code)),
        _ => return None,
    };
    let mut detail = String::new();
    if received.flags & ACK_TLVS != 0 {
        let request = u32::from_ne_bytes(number(received.payload, 4)?);
        let request = if received.flags & CAPPED != 0 { HEADER } else { usize::try_from(request).ok()? };
        if let Some(text) = Attributes::behind(received.payload, request.checked_add(4)?).find(ERROR_TEXT) {
            detail = text.text().into_owned();
        }
    }
    Some(Answer { errno, detail })
}

/// Which part of the kernel a socket speaks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Links, addresses, routes.
    Route,
    /// nftables.
    Netfilter,
}

/// A socket into the network namespace that its thread was in when it was opened; it stays there.
pub struct Socket {
    socket: netlink_sys::Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket in the current thread's network namespace.
    pub fn open(protocol: Protocol) -> Result<Socket, Error> {
        let number = match protocol {
            Protocol::Route => netlink_sys::protocols::NETLINK_ROUTE,
            Protocol::Netfilter => netlink_sys::protocols::NETLINK_NETFILTER,
        };
        let open = || -> std::io::Result<netlink_sys::Socket> {
            let socket = netlink_sys::Socket::new(number)?;
            // The kernel's words on a refusal, without the request in front of them.
            socket.set_ext_ack(true)?;
            socket.set_cap_ack(true)?;
            // Without it the kernel ignores the filters of a dump.
            socket.set_netlink_get_strict_chk(true)?;
            set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIMEOUT))?;
            Ok(socket)
        };
        let socket = open().map_err(|e| socket_error("open", &e))?;
        Ok(Socket { socket, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// The port by which the kernel tells who made a change. The kernel gives one with the first message, or here.
    pub fn port(&mut self) -> Result<u32, Error> {
        let mut address = netlink_sys::SocketAddr::new(0, 0);
        let known = self.socket.get_address(&mut address).map(|()| address.port_number());
        match known {
            Ok(port) if port != 0 => Ok(port),
            _ => {
                self.socket.bind_auto().map(|bound| bound.port_number()).map_err(|e| socket_error("bind", &e))
            }
        }
    }

    /// Sends one message and waits for its acknowledgement.
    pub fn request(&mut self, message: Message) -> Result<(), Error> {
        self.request_all(vec![message])
    }

    /// Sends messages in one go and reads every acknowledgement. The kernel goes on behind a failed one;
    /// the first error is returned, so this is for messages of which each is harmless without the others.
    pub fn request_all(&mut self, messages: Vec<Message>) -> Result<(), Error> {
        self.request_each(messages)?.into_iter().collect()
    }

    /// Sends messages in one go and returns each one's outcome, in order.
    pub fn request_each(&mut self, messages: Vec<Message>) -> Result<Vec<Result<(), Error>>, Error> {
        self.ask_each(messages, |_| ())
    }

    /// Sends one message; hands what comes back besides the acknowledgement (the object of a get, or the
    /// [`ECHO`] of a new one) to `each`.
    pub fn ask(&mut self, message: Message, each: impl FnMut(Received<'_>)) -> Result<(), Error> {
        self.ask_each(vec![message], each)?.into_iter().collect()
    }

    /// Sends messages in one go, hands what comes back besides the acknowledgements to `each`, and returns
    /// each one's outcome, in order.
    ///
    /// Only the last message asks for an acknowledgement, as in [`Socket::transact`]: refusals always come, and in
    /// order, so what was not refused by then is done. That saves a system call for each of thousands of routes.
    pub fn ask_each(
        &mut self,
        messages: Vec<Message>,
        mut each: impl FnMut(Received<'_>),
    ) -> Result<Vec<Result<(), Error>>, Error> {
        let Some(last) = messages.len().checked_sub(1) else { return Ok(Vec::new()) };
        let whats: Vec<String> = messages.iter().map(|m| m.what().to_owned()).collect();
        let first = self.sequence.wrapping_add(1);
        let mut out = Vec::new();
        for (index, message) in messages.into_iter().enumerate() {
            self.sequence = self.sequence.wrapping_add(1);
            message.finish(if index == last { ACK } else { 0 }, self.sequence, &mut out)?;
        }
        let all = whats.join(", ");
        self.send(&out, &all)?;
        let mut outcomes: Vec<Result<(), Error>> = whats.iter().map(|_| Ok(())).collect();
        loop {
            let length = self.receive(&all)?;
            for received in split(self.buffer.get(..length).unwrap_or_default()) {
                let index = usize::try_from(received.sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
                let (Some(what), Some(outcome)) = (whats.get(index), outcomes.get_mut(index)) else {
                    continue;
                };
                if received.kind != MSG_ERROR {
                    each(received);
                    continue;
                }
                let answer = read_answer(&received).ok_or_else(|| Error::Malformed { what: what.clone() })?;
                if let Some(errno) = answer.errno {
                    *outcome = Err(Error::Refused { what: what.clone(), errno, detail: answer.detail });
                }
                if index == last {
                    return Ok(outcomes);
                }
            }
        }
    }

    /// Sends a get request for all objects and returns what `read` makes of each. Read again from the
    /// start when the kernel says that the list changed meanwhile.
    pub fn dump<T>(
        &mut self,
        message: &Message,
        mut read: impl FnMut(Received<'_>) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        for _ in 0..DUMP_TRIES {
            if let Some(objects) = self.dump_once(message.clone(), &mut read)? {
                return Ok(objects);
            }
        }
        Err(Error::Interrupted { what: message.what().to_owned() })
    }

    /// `None` if the dump was interrupted.
    fn dump_once<T>(
        &mut self,
        message: Message,
        read: &mut impl FnMut(Received<'_>) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Error> {
        let what = message.what().to_owned();
        self.sequence = self.sequence.wrapping_add(1);
        let mut out = Vec::new();
        message.finish(DUMP, self.sequence, &mut out)?;
        self.send(&out, &what)?;
        let (mut objects, mut interrupted) = (Vec::new(), false);
        loop {
            let length = self.receive(&what)?;
            for received in split(self.buffer.get(..length).unwrap_or_default()) {
                if received.sequence != self.sequence {
                    continue;
                }
                interrupted |= received.flags & DUMP_INTERRUPTED != 0;
                match received.kind {
                    MSG_NOOP => {}
                    MSG_DONE | MSG_ERROR => {
                        let malformed = || Error::Malformed { what: what.clone() };
                        let answer = read_answer(&received).ok_or_else(malformed)?;
                        return match answer.errno {
                            // nf_tables says "interrupted" with an error instead of the flag.
                            Some(Errno::INTR) => Ok(None),
                            Some(errno) => Err(Error::Refused { what, errno, detail: answer.detail }),
                            None if interrupted => Ok(None),
                            None => Ok(Some(objects)),
                        };
                    }
                    _ => objects.extend(read(received)),
                }
            }
        }
    }

    /// Sends messages as one nftables transaction and reads the answers: either all of them took effect
    /// or none did. The first refused one is named.
    ///
    /// Only the last message asks for an acknowledgement. Refusals always come, whatever was asked, and
    /// in order; so the answer to the last one ends the reading, and a batch of thousands cannot
    /// overflow the socket with acknowledgements.
    pub fn transact(&mut self, begin: Message, messages: Vec<Message>, end: Message) -> Result<(), Error> {
        let whats: Vec<String> = messages.iter().map(|m| m.what().to_owned()).collect();
        let Some(last) = whats.len().checked_sub(1) else { return Ok(()) };
        let start = self.sequence.wrapping_add(1);
        let mut out = Vec::new();
        let count = messages.len();
        begin.finish(0, start, &mut out)?;
        self.sequence = start;
        for (i, message) in messages.into_iter().enumerate() {
            self.sequence = self.sequence.wrapping_add(1);
            message.finish(if i + 1 == count { ACK } else { 0 }, self.sequence, &mut out)?;
        }
        self.sequence = self.sequence.wrapping_add(1);
        end.finish(0, self.sequence, &mut out)?;

        let all = format!("nftables transaction of {count} messages");
        // A socket's default buffer holds some 200 KB, and a transaction must be one datagram.
        set_socket_send_buffer_size_force(&self.socket, out.len().saturating_mul(2).max(256 * 1024))
            .map_err(|errno| Error::Socket { what: all.clone(), errno })?;
        self.send(&out, &all)?;

        let mut failure = None;
        loop {
            let length = self.receive(&all)?;
            for received in split(self.buffer.get(..length).unwrap_or_default()) {
                if received.kind != MSG_ERROR {
                    continue;
                }
                let answer = read_answer(&received).ok_or_else(|| Error::Malformed { what: all.clone() })?;
                // Sequence 0 of this batch is its begin message: an answer to it is about the whole.
                let offset = usize::try_from(received.sequence.wrapping_sub(start)).unwrap_or(usize::MAX);
                let about_whole = offset == 0;
                let what = match offset.checked_sub(1) {
                    None => Some(&all),
                    Some(index) => whats.get(index),
                };
                let Some(what) = what else { continue };
                if let Some(errno) = answer.errno {
                    failure.get_or_insert(Error::Refused {
                        what: what.clone(),
                        errno,
                        detail: answer.detail,
                    });
                }
                if about_whole || offset == last + 1 {
                    return failure.map_or(Ok(()), Err);
                }
            }
        }
    }

    fn send(&self, bytes: &[u8], what: &str) -> Result<(), Error> {
        fail::step(what)
            .and_then(|()| self.socket.send(bytes, 0))
            .map(|_| ())
            .map_err(|e| socket_error(what, &e))
    }

    fn receive(&mut self, what: &str) -> Result<usize, Error> {
        loop {
            match rustix::net::recv(&self.socket, self.buffer.as_mut_slice(), RecvFlags::TRUNC) {
                Ok((_, length)) if length > self.buffer.len() => {
                    return Err(Error::Malformed { what: what.to_owned() });
                }
                Ok((_, length)) => return Ok(length),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::Socket { what: what.to_owned(), errno }),
            }
        }
    }
}

fn socket_error(what: &str, error: &std::io::Error) -> Error {
    let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
    Error::Socket { what: what.to_owned(), errno }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes_of(message: Message) -> Vec<u8> {
        let mut out = Vec::new();
        message.finish(ACK, 7, &mut out).unwrap();
        out
    }

    #[test]
    fn a_message_reads_back_as_it_was_written() {
        let mut message = Message::new(16, CREATE, &[0; 16], "test");
        message.attr_str(3, "eth0").attr_u32(4, 1500).nest(18, |m| {
            m.attr_str(1, "veth").nest(2, |m| {
                m.raw(&[9; 3]).attr_u8(5, 1);
            });
        });
        let bytes = bytes_of(message);
        let received = split(&bytes).next().unwrap();
        assert_eq!((received.kind, received.flags, received.sequence), (16, REQUEST | CREATE | ACK, 7));
        let attributes = Attributes::behind(received.payload, 16);
        assert_eq!(attributes.find(3).unwrap().text(), "eth0");
        assert_eq!(attributes.find(4).unwrap().u32(), Some(1500));
        let info = attributes.find(18).unwrap().nested();
        assert_eq!(info.find(1).unwrap().text(), "veth");
        let data = info.find(2).unwrap();
        assert_eq!(Attributes::behind(data.value, 3).find(5).unwrap().u8(), Some(1));
    }

    #[test]
    fn an_attribute_that_is_too_long_is_an_error_and_not_a_wrong_length() {
        let mut message = Message::new(16, 0, &[], "long");
        message.attr(1, &vec![0; 65_532]);
        assert!(matches!(message.finish(0, 1, &mut Vec::new()), Err(Error::Oversized { .. })));
        let mut message = Message::new(16, 0, &[], "long");
        message.nest(1, |m| {
            for _ in 0..9 {
                m.attr(2, &[0; 8000]);
            }
        });
        assert!(matches!(message.finish(0, 1, &mut Vec::new()), Err(Error::Oversized { .. })));
    }

    #[test]
    fn an_answer_with_a_number_that_is_no_error_is_none() {
        let answer = |code: i32| {
            let payload = [code.to_ne_bytes().as_slice(), &[0; 16]].concat();
            read_answer(&Received { kind: MSG_ERROR, flags: 0, sequence: 1, payload: &payload })
        };
        assert_eq!(answer(0).map(|a| a.errno), Some(None));
        assert_eq!(answer(-17).map(|a| a.errno), Some(Some(Errno::EXIST)));
        for code in [1, i32::MAX, i32::MIN, -4096] {
            assert_eq!(answer(code), None, "{code}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_from_the_kernel_can_cause_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for received in split(&bytes) {
                let _ = read_answer(&received);
                for attribute in Attributes::behind(received.payload, 16) {
                    let _ = (attribute.u32(), attribute.be64(), attribute.text().len());
                    let _ = attribute.nested().count();
                }
            }
        }
    }
}
