//! One transaction: additions and deletions that take effect together or not at all.

use plat_crds::Block;

use super::set::intervals;
use super::{
    BaseChain, DELETE_CHAIN, DELETE_ELEMENTS, DELETE_RULE, DELETE_SET, DELETE_TABLE, Element, Error,
    NEW_CHAIN, NEW_ELEMENTS, NEW_RULE, NEW_SET, NEW_TABLE, Policy, Rule, SUBSYSTEM, Set, Table, header,
};
use crate::netlink::{APPEND, CREATE, Message, Socket};

/// `NFNL_MSG_BATCH_BEGIN`; its resource number names the subsystem.
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// An attribute holds at most 65,535 bytes; longer element lists go into several messages.
const ELEMENTS_BYTES: usize = 32 * 1024;
/// Zero byte included, as the kernel counts (`NFT_USERDATA_MAXLEN` less its header).
const COMMENT_BYTES: usize = 128;

/// A transaction under construction. Order matters: what a message names must exist by then.
#[derive(Debug, Default)]
pub struct Batch {
    messages: Vec<Message>,
    sets: u32,
}

impl Batch {
    /// An empty transaction.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// `add table`: no error if it exists.
    pub fn add_table(&mut self, table: &Table) {
        self.message(NEW_TABLE, CREATE, table, format!("add table {table}")).attr_str(1, &table.name);
    }

    /// `delete table` with all that is in it: an error if it does not exist.
    pub fn delete_table(&mut self, table: &Table) {
        self.message(DELETE_TABLE, 0, table, format!("delete table {table}")).attr_str(1, &table.name);
    }

    /// Empties a table in the one way that works whether it exists or not: add, delete, add. Inside one
    /// transaction no packet sees it empty.
    pub fn replace_table(&mut self, table: &Table) {
        self.add_table(table);
        self.delete_table(table);
        self.add_table(table);
    }

    /// `add chain` without a hook, to be jumped to: no error if it exists.
    pub fn add_chain(&mut self, table: &Table, name: &str) {
        self.message(NEW_CHAIN, CREATE, table, format!("add chain {table} {name}"))
            .attr_str(1, &table.name)
            .attr_str(3, name);
    }

    /// `add chain … { type … hook … priority …; policy …; }`: no error if it exists just so.
    pub fn add_base_chain(&mut self, table: &Table, name: &str, base: &BaseChain) {
        let policy = match base.policy {
            Policy::Drop => 0,
            Policy::Accept => 1,
        };
        self.message(NEW_CHAIN, CREATE, table, format!("add base chain {table} {name}"))
            .attr_str(1, &table.name)
            .attr_str(3, name)
            .nest(4, |m| {
                m.attr_be32(1, base.hook.number()).attr(2, &base.priority.to_be_bytes());
            })
            .attr_be32(5, policy)
            .attr_str(7, base.kind);
    }

    /// `flush chain`: deletes its rules.
    pub fn flush_chain(&mut self, table: &Table, name: &str) {
        self.message(DELETE_RULE, 0, table, format!("flush chain {table} {name}"))
            .attr_str(1, &table.name)
            .attr_str(2, name);
    }

    /// `delete chain`: an error if it does not exist or something jumps to it.
    pub fn delete_chain(&mut self, table: &Table, name: &str) {
        self.message(DELETE_CHAIN, 0, table, format!("delete chain {table} {name}"))
            .attr_str(1, &table.name)
            .attr_str(3, name);
    }

    /// `add rule`: at the end of its chain.
    pub fn add_rule(&mut self, rule: &Rule) {
        self.rule(rule, CREATE | APPEND, "add");
    }

    /// `insert rule`: at the head of its chain.
    pub fn insert_rule(&mut self, rule: &Rule) {
        self.rule(rule, CREATE, "insert");
    }

    fn rule(&mut self, rule: &Rule, flags: u16, verb: &str) {
        let what = format!("{verb} rule {} {} {}", rule.table, rule.chain, rule.text());
        let message = self.message(NEW_RULE, flags, &rule.table, what);
        message.attr_str(1, &rule.table.name).attr_str(2, &rule.chain).nest(4, |m| {
            for expression in rule.expressions() {
                expression.encode(m);
            }
        });
        if let Some(comment) = &rule.comment {
            message.attr(7, &comment_userdata(comment));
        }
    }

    /// `delete rule … handle …`
    pub fn delete_rule(&mut self, table: &Table, chain: &str, handle: u64) {
        self.message(DELETE_RULE, 0, table, format!("delete rule {table} {chain} handle {handle}"))
            .attr_str(1, &table.name)
            .attr_str(2, chain)
            .attr(3, &handle.to_be_bytes());
    }

    /// `add set` or `add map`: no error if it exists just so.
    pub fn add_set(&mut self, set: &Set) {
        self.sets += 1;
        let id = self.sets;
        let what = format!("add set {} {}", set.table, set.name);
        set.encode(self.message(NEW_SET, CREATE, &set.table, what), id);
    }

    /// `delete set`: an error if it does not exist or a rule uses it.
    pub fn delete_set(&mut self, set: &Set) {
        self.message(DELETE_SET, 0, &set.table, format!("delete set {} {}", set.table, set.name))
            .attr_str(1, &set.table.name)
            .attr_str(2, &set.name);
    }

    /// `add element`: no error if it exists with the same value.
    pub fn add_elements(&mut self, set: &Set, elements: &[Element]) {
        self.elements(set, elements, NEW_ELEMENTS, CREATE, "add");
    }

    /// `delete element`: an error if one does not exist.
    pub fn delete_elements(&mut self, set: &Set, elements: &[Element]) {
        self.elements(set, elements, DELETE_ELEMENTS, 0, "delete");
    }

    /// `flush set`: deletes its elements.
    pub fn flush_set(&mut self, set: &Set) {
        self.message(DELETE_ELEMENTS, 0, &set.table, format!("flush set {} {}", set.table, set.name))
            .attr_str(1, &set.table.name)
            .attr_str(2, &set.name);
    }

    /// Fills a set made by [`Set::prefixes`]: sorted, and merged where prefixes overlap or touch.
    pub fn add_prefixes(&mut self, set: &Set, prefixes: &[Block]) {
        for family in plat_crds::Family::ALL {
            if prefixes.iter().any(|p| p.family() == family) {
                self.add_elements(set, &intervals(family, prefixes));
            }
        }
    }

    fn elements(&mut self, set: &Set, mut rest: &[Element], kind: u16, flags: u16, verb: &str) {
        while !rest.is_empty() {
            let mut taken = 0;
            let what = format!("{verb} elements of set {} {}", set.table, set.name);
            let message = self.message(kind, flags, &set.table, what);
            message.attr_str(1, &set.table.name).attr_str(2, &set.name).nest(3, |m| {
                for element in rest {
                    if m.len() > ELEMENTS_BYTES {
                        break;
                    }
                    element.encode(m);
                    taken += 1;
                }
            });
            rest = rest.get(taken..).unwrap_or_default();
        }
    }

    fn message(&mut self, kind: u16, flags: u16, table: &Table, what: String) -> &mut Message {
        self.messages.push(Message::new(kind, flags, &header(table.family.number()), what));
        let last = self.messages.len() - 1;
        &mut self.messages[last]
    }

    /// Sends the transaction; the error names the first message that was refused, and then nothing has
    /// changed. An empty one does nothing.
    pub fn send(self, socket: &mut Socket) -> Result<(), Error> {
        let [high, low] = SUBSYSTEM.to_be_bytes();
        let begin = Message::new(BATCH_BEGIN, 0, &[0, 0, high, low], "begin of transaction");
        let end = Message::new(BATCH_END, 0, &[0, 0, high, low], "end of transaction");
        socket.transact(begin, self.messages, end)
    }
}

/// A comment as nft stores it: type 0, length, text with zero byte. Longer ones are cut.
fn comment_userdata(comment: &str) -> Vec<u8> {
    let mut cut = comment.len().min(COMMENT_BYTES - 1);
    while !comment.is_char_boundary(cut) {
        cut -= 1;
    }
    let text = comment.get(..cut).unwrap_or_default().as_bytes();
    let length = u8::try_from(text.len() + 1).unwrap_or(u8::MAX);
    let mut bytes = vec![0, length];
    bytes.extend_from_slice(text);
    bytes.push(0);
    bytes
}
