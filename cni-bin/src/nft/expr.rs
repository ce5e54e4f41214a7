//! Expressions: the instructions of a rule, to and from the kernel's encoding.

use std::fmt;

use crate::netlink::{Attribute, Attributes, Message};

/// Register 1, which every match of ours loads into and compares.
pub(super) const REG_1: u32 = 1;
const REG_VERDICT: u32 = 0;

const LIST_ELEMENT: u16 = 1;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;

pub(super) const META_MARK: u32 = 3;
pub(super) const META_PROTOCOL: u32 = 1;
pub(super) const META_IIFNAME: u32 = 6;
pub(super) const META_OIFNAME: u32 = 7;
pub(super) const META_NFPROTO: u32 = 15;
pub(super) const META_L4PROTO: u32 = 16;
pub(super) const BASE_LINK: u32 = 0;
pub(super) const BASE_NETWORK: u32 = 1;
pub(super) const BASE_TRANSPORT: u32 = 2;
pub(super) const CT_STATE: u32 = 0;
pub(super) const CT_STATUS: u32 = 2;
pub(super) const FIB_RESULT_ADDRTYPE: u32 = 3;
pub(super) const FIB_SADDR: u32 = 1;
pub(super) const FIB_DADDR: u32 = 2;
/// `NFT_NAT_SNAT`.
pub(super) const NAT_SOURCE: u32 = 0;
/// `NFT_NAT_DNAT`.
pub(super) const NAT_DESTINATION: u32 = 1;
/// `NF_NAT_RANGE_MAP_IPS` and `NF_NAT_RANGE_PROTO_SPECIFIED`, which the kernel adds by itself and shows.
pub(super) const NAT_ADDRESS_AND_PORT: u32 = 3;
/// `NF_NAT_RANGE_MAP_IPS`, which the kernel adds by itself and shows.
pub(super) const NAT_ADDRESS: u32 = 1;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`.
pub(super) const NAT_FULLY_RANDOM: u32 = 16;

/// How a comparison compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cmp {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
}

impl Cmp {
    fn number(self) -> u32 {
        match self {
            Cmp::Eq => 0,
            Cmp::Ne => 1,
        }
    }
}

/// What becomes of a packet, or where it goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Accepted by this hook's chain.
    Accept,
    /// Dropped.
    Drop,
    /// Back to the calling chain.
    Return,
    /// On with the next rule.
    Continue,
    /// Into another chain, and back.
    Jump(String),
    /// Into another chain, not back.
    Goto(String),
}

/// As nft writes it.
impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Accept => f.write_str("accept"),
            Verdict::Drop => f.write_str("drop"),
            Verdict::Return => f.write_str("return"),
            Verdict::Continue => f.write_str("continue"),
            Verdict::Jump(chain) => write!(f, "jump {chain}"),
            Verdict::Goto(chain) => write!(f, "goto {chain}"),
        }
    }
}

impl Verdict {
    fn code(&self) -> i32 {
        match self {
            Verdict::Drop => 0,
            Verdict::Accept => 1,
            Verdict::Continue => -1,
            Verdict::Jump(_) => -3,
            Verdict::Goto(_) => -4,
            Verdict::Return => -5,
        }
    }

    fn chain(&self) -> Option<&str> {
        match self {
            Verdict::Jump(chain) | Verdict::Goto(chain) => Some(chain),
            _ => None,
        }
    }

    /// Writes the verdict as a data attribute (`NFTA_IMMEDIATE_DATA`, `NFTA_SET_ELEM_DATA`) of that kind.
    pub(super) fn encode(&self, kind: u16, message: &mut Message) {
        message.nest(kind, |m| {
            m.nest(DATA_VERDICT, |m| {
                m.attr(VERDICT_CODE, &self.code().to_be_bytes());
                if let Some(chain) = self.chain() {
                    m.attr_str(VERDICT_CHAIN, chain);
                }
            });
        });
    }

    /// Reads a data attribute that holds a verdict.
    pub fn decode(data: Attribute<'_>) -> Option<Verdict> {
        let verdict = data.nested().find(DATA_VERDICT)?.nested();
        let code = i32::from_ne_bytes(verdict.find(VERDICT_CODE)?.be32()?.to_ne_bytes());
        let chain = || verdict.find(VERDICT_CHAIN).map(|c| c.text().into_owned()).unwrap_or_default();
        Some(match code {
            0 => Verdict::Drop,
            1 => Verdict::Accept,
            -1 => Verdict::Continue,
            -3 => Verdict::Jump(chain()),
            -4 => Verdict::Goto(chain()),
            -5 => Verdict::Return,
            _ => return None,
        })
    }
}

/// One instruction. Numbers are the kernel's own (`nf_tables.h`); values are in network byte order unless
/// said otherwise. Registers: each loads into register 1 and tests register 1, but for [`Expr::Nat`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expr {
    /// Loads a property of the packet (`NFT_META_*`).
    Meta {
        /// Which.
        key: u32,
    },
    /// Loads bytes of the packet.
    Payload {
        /// 0 link, 1 network, 2 transport header.
        base: u32,
        /// Offset from there, in bytes.
        offset: u32,
        /// Number of bytes.
        length: u32,
    },
    /// Loads what the other expression ([`Expr::Meta`], [`Expr::Payload`]) would load into register 1 into
    /// this register: the further parts of a concatenated key.
    Into {
        /// The register, as the kernel shows it.
        register: u32,
        /// What is loaded.
        load: Box<Expr>,
    },
    /// Goes on only if the register compares.
    Compare {
        /// How.
        op: Cmp,
        /// With what.
        value: Vec<u8>,
    },
    /// `register = register & mask ^ xor`.
    Bitwise {
        /// Bits that are kept.
        mask: Vec<u8>,
        /// Bits that are turned.
        xor: Vec<u8>,
    },
    /// Goes on only if the register's value is in the set (or, inverted, is not).
    Lookup {
        /// The set's name.
        set: String,
        /// Whether absence matches.
        inverted: bool,
    },
    /// Looks the register up in a map; the map's value goes to that register (0: it is a verdict).
    MapLookup {
        /// The map's name.
        map: String,
        /// Where the value goes.
        to: u32,
    },
    /// Counts packets and bytes. The counts themselves are not part of a rule's identity and not read.
    Counter,
    /// Decides.
    Verdict(Verdict),
    /// Loads a constant into a register.
    Load {
        /// The register.
        to: u32,
        /// The value.
        value: Vec<u8>,
    },
    /// Source NAT to the address of the interface on which the packet leaves.
    Masquerade {
        /// `NF_NAT_RANGE_*` flags.
        flags: u32,
    },
    /// Source or destination NAT to the address (and port) in registers.
    Nat {
        /// 0 source, 1 destination.
        kind: u32,
        /// `NFPROTO_IPV4` or `NFPROTO_IPV6`.
        family: u32,
        /// Register of the address; `None` keeps it.
        address: Option<u32>,
        /// Register of the port; `None` keeps it.
        port: Option<u32>,
        /// `NF_NAT_RANGE_*` flags.
        flags: u32,
    },
    /// Loads a property of the connection (`NFT_CT_*`), in the machine's byte order.
    Conntrack {
        /// Which.
        key: u32,
    },
    /// Loads what the routing table says about an address.
    Fib {
        /// 1 interface, 2 its name, 3 type of address.
        result: u32,
        /// Which address (1 source, 2 destination) and with which interface.
        flags: u32,
    },
    /// An expression that this program does not write: its name, and its attributes as the kernel sent
    /// them.
    Other {
        /// Its name, such as `match`.
        name: String,
        /// Its attributes.
        data: Vec<u8>,
    },
}

/// The number of the register `words` words of four bytes behind register 1. A register of 16 bytes, where
/// one begins, goes by its own number; that is how the kernel shows it.
pub(super) fn register(words: u32) -> u32 {
    /// `NFT_REG32_00`, the first word of register 1.
    const WORD_0: u32 = 8;
    if words.is_multiple_of(4) { REG_1 + words / 4 } else { WORD_0 + words }
}

impl Expr {
    fn name(&self) -> &str {
        match self {
            Expr::Meta { .. } => "meta",
            Expr::Payload { .. } => "payload",
            Expr::Into { load, .. } => load.name(),
            Expr::Compare { .. } => "cmp",
            Expr::Bitwise { .. } => "bitwise",
            Expr::Lookup { .. } | Expr::MapLookup { .. } => "lookup",
            Expr::Counter => "counter",
            Expr::Verdict(_) | Expr::Load { .. } => "immediate",
            Expr::Masquerade { .. } => "masq",
            Expr::Nat { .. } => "nat",
            Expr::Conntrack { .. } => "ct",
            Expr::Fib { .. } => "fib",
            Expr::Other { name, .. } => name,
        }
    }

    /// Writes the expression as one element of a list of expressions.
    pub fn encode(&self, message: &mut Message) {
        message.nest(LIST_ELEMENT, |m| {
            m.attr_str(EXPR_NAME, self.name());
            m.nest(EXPR_DATA, |m| self.encode_data(m));
        });
    }

    fn encode_data(&self, m: &mut Message) {
        match self {
            Expr::Meta { .. } | Expr::Payload { .. } => self.encode_load(REG_1, m),
            Expr::Into { register, load } => load.encode_load(*register, m),
            Expr::Compare { op, value } => {
                m.attr_be32(1, REG_1).attr_be32(2, op.number());
                m.nest(3, |m| {
                    m.attr(DATA_VALUE, value);
                });
            }
            Expr::Bitwise { mask, xor } => {
                let length = u32::try_from(mask.len()).unwrap_or(u32::MAX);
                m.attr_be32(1, REG_1).attr_be32(2, REG_1).attr_be32(3, length);
                m.nest(4, |m| {
                    m.attr(DATA_VALUE, mask);
                });
                m.nest(5, |m| {
                    m.attr(DATA_VALUE, xor);
                });
            }
            Expr::Lookup { set, inverted } => {
                m.attr_str(1, set).attr_be32(2, REG_1);
                if *inverted {
                    m.attr_be32(5, 1);
                }
            }
            Expr::MapLookup { map, to } => {
                m.attr_str(1, map).attr_be32(2, REG_1).attr_be32(3, *to);
            }
            Expr::Counter => {
                m.attr(1, &[0; 8]).attr(2, &[0; 8]);
            }
            Expr::Verdict(verdict) => {
                m.attr_be32(1, REG_VERDICT);
                verdict.encode(2, m);
            }
            Expr::Load { to, value } => {
                m.attr_be32(1, *to).nest(2, |m| {
                    m.attr(DATA_VALUE, value);
                });
            }
            Expr::Masquerade { flags } => {
                if *flags != 0 {
                    m.attr_be32(1, *flags);
                }
            }
            Expr::Nat { kind, family, address, port, flags } => {
                m.attr_be32(1, *kind).attr_be32(2, *family);
                if let Some(register) = address {
                    m.attr_be32(3, *register);
                }
                if let Some(register) = port {
                    m.attr_be32(5, *register);
                }
                if *flags != 0 {
                    m.attr_be32(7, *flags);
                }
            }
            Expr::Conntrack { key } => {
                m.attr_be32(2, *key).attr_be32(1, REG_1);
            }
            Expr::Fib { result, flags } => {
                m.attr_be32(1, REG_1).attr_be32(2, *result).attr_be32(3, *flags);
            }
            Expr::Other { data, .. } => {
                m.raw(data);
            }
        }
    }

    /// Writes a load from the packet into a register.
    fn encode_load(&self, register: u32, m: &mut Message) {
        match self {
            Expr::Meta { key } => {
                m.attr_be32(2, *key).attr_be32(1, register);
            }
            Expr::Payload { base, offset, length } => {
                m.attr_be32(1, register).attr_be32(2, *base).attr_be32(3, *offset).attr_be32(4, *length);
            }
            // Nothing else loads from the packet by a number alone.
            _ => {}
        }
    }

    /// The loads of a concatenated key, part by part: each goes behind the one before, from register 1 on,
    /// at a multiple of four bytes. A part is a load and its length in bytes.
    pub(super) fn concatenation(parts: impl IntoIterator<Item = (Expr, u32)>) -> Vec<Expr> {
        let mut words = 0;
        let mut place = |(load, length): (Expr, u32)| {
            let register = register(words);
            words += length.div_ceil(4);
            if register == REG_1 { load } else { Expr::Into { register, load: Box::new(load) } }
        };
        parts.into_iter().map(&mut place).collect()
    }

    /// Reads one element of a list of expressions. What is not exactly what [`Expr::encode`] would write
    /// (another register, another operation) comes back as [`Expr::Other`].
    pub fn decode(element: Attribute<'_>) -> Option<Expr> {
        let expression = element.nested();
        let name = expression.find(EXPR_NAME)?.text().into_owned();
        let data = expression.find(EXPR_DATA);
        let bytes = data.map(|d| d.value).unwrap_or_default();
        let known = data.map_or_else(|| Attributes::behind(&[], 0), |d| d.nested());
        Some(Expr::decode_known(&name, &known).unwrap_or(Expr::Other { name, data: bytes.to_vec() }))
    }

    fn decode_known(name: &str, data: &Attributes<'_>) -> Option<Expr> {
        let number = |kind| data.find(kind).and_then(|a| a.be32());
        let value = |kind| data.find(kind)?.nested().find(DATA_VALUE).map(|v| v.value.to_vec());
        let in_reg_1 = |kind| number(kind) == Some(REG_1);
        let into = |register: Option<u32>, load: Expr| match register {
            Some(REG_1) => Some(load),
            other => Some(Expr::Into { register: other?, load: Box::new(load) }),
        };
        Some(match name {
            "meta" => into(number(1), Expr::Meta { key: number(2)? })?,
            "payload" => {
                // Attribute 5 is the source register of a write into the packet, which has no attribute 1.
                let load = Expr::Payload { base: number(2)?, offset: number(3)?, length: number(4)? };
                into(number(1), load)?
            }
            "cmp" if in_reg_1(1) => {
                let op = [Cmp::Eq, Cmp::Ne].into_iter().find(|op| Some(op.number()) == number(2))?;
                Expr::Compare { op, value: value(3)? }
            }
            // Attribute 6 is the operation; 0 is mask-and-xor.
            "bitwise" if in_reg_1(1) && in_reg_1(2) && number(6).unwrap_or(0) == 0 => {
                Expr::Bitwise { mask: value(4)?, xor: value(5)? }
            }
            "lookup" if in_reg_1(2) => {
                let name = data.find(1)?.text().into_owned();
                match number(3) {
                    Some(to) => Expr::MapLookup { map: name, to },
                    None => Expr::Lookup { set: name, inverted: number(5).unwrap_or(0) & 1 != 0 },
                }
            }
            "counter" => Expr::Counter,
            "immediate" => match number(1)? {
                REG_VERDICT => Expr::Verdict(Verdict::decode(data.find(2)?)?),
                to => Expr::Load { to, value: value(2)? },
            },
            // Attributes 2 and 3 are port registers, which ours never has.
            "masq" if number(2).is_none() => Expr::Masquerade { flags: number(1).unwrap_or(0) },
            "nat" => Expr::Nat {
                kind: number(1)?,
                family: number(2)?,
                address: number(3),
                port: number(5),
                flags: number(7).unwrap_or(0),
            },
            "ct" if in_reg_1(1) => Expr::Conntrack { key: number(2)? },
            "fib" if in_reg_1(1) => Expr::Fib { result: number(2)?, flags: number(3)? },
            _ => return None,
        })
    }
}
