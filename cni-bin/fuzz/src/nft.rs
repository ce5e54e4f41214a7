//! nftables messages: what one `recv` brings.

use plat_cni::netlink::{Attributes, Message, Received, split};
use plat_cni::nft::{Expr, read_chain, read_elements, read_rule, read_table};

/// Any bytes are read or passed over. A rule's expressions that were read and are written again are the
/// same.
pub fn check(input: &[u8]) {
    for received in split(input) {
        if let Some(table) = read_table(&received) {
            assert!(!table.table.to_string().contains('\0'));
        }
        read_chain(&received);
        read_elements(&received);
        if let Some(rule) = read_rule(&received) {
            must_come_back(&rule.expressions);
        }
    }
}

fn must_come_back(expressions: &[Expr]) {
    // Attributes are padded on their way, which the unknown ones of others need not have been.
    let whole = |e: &&Expr| !matches!(e, Expr::Other { data, .. } if data.len() % 4 != 0);
    let expressions: Vec<&Expr> = expressions.iter().filter(whole).collect();
    let mut message = Message::new(0, 0, &[], "expressions");
    message.nest(1, |m| expressions.iter().for_each(|e| e.encode(m)));
    // Read from one message they fit into one, but for their padding.
    let Ok(bytes) = message.encode() else { return };
    let list = |received: Received<'_>| {
        Attributes::behind(received.payload, 0)
            .find(1)
            .map(|a| a.nested().filter_map(Expr::decode).collect::<Vec<_>>())
    };
    let read = split(&bytes).next().and_then(list).unwrap_or_default();
    assert_eq!(read.iter().collect::<Vec<_>>(), expressions);
}
