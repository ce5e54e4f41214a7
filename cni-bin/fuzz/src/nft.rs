//! Messages of nftables and connection tracking: what one `recv` brings.

use plat_cni::conntrack::read_flow;
use plat_cni::netlink::{Attribute, Attributes, Message, split};
use plat_cni::nft::{Element, Expr, read_chain, read_elements, read_rule, read_table};

/// Any bytes are read or passed over. A rule's expressions and a set's elements that were read and are
/// written again are the same.
pub fn check(input: &[u8]) {
    for received in split(input) {
        if let Some(table) = read_table(&received) {
            assert!(!table.table.to_string().contains('\0'));
        }
        read_chain(&received);
        read_flow(&received);
        if let Some(elements) = read_elements(&received) {
            let read = again(&elements, Element::encode, Element::decode);
            assert!(read.is_none_or(|read| read == elements), "{elements:?}");
        }
        if let Some(mut rule) = read_rule(&received) {
            // Attributes are padded on their way, which the unknown ones of others need not have been.
            rule.expressions.retain(|e| !matches!(e, Expr::Other { data, .. } if data.len() % 4 != 0));
            let read = again(&rule.expressions, Expr::encode, Expr::decode);
            assert!(read.is_none_or(|read| read == rule.expressions), "{:?}", rule.expressions);
        }
    }
}

/// Writes a list and reads it again; `None` if it does not fit into a message, which with its padding it may
/// not.
fn again<T>(
    list: &[T],
    encode: impl Fn(&T, &mut Message),
    decode: impl Fn(Attribute<'_>) -> Option<T>,
) -> Option<Vec<T>> {
    let mut message = Message::new(0, 0, &[], "a list");
    message.nest(1, |m| list.iter().for_each(|item| encode(item, m)));
    let bytes = message.encode().ok()?;
    let received = split(&bytes).next()?;
    let list = Attributes::behind(received.payload, 0).find(1)?;
    Some(list.nested().filter_map(decode).collect())
}
