//! Reading tables, chains, rules and elements back.

use super::{
    Element, Error, Expr, GENERIC_HEADER, GET_CHAIN, GET_ELEMENTS, GET_RULE, GET_TABLE, Policy, Set, Table,
    TableFamily, header,
};
use crate::netlink::{Attributes, Message, Received, Socket, deleted};

/// A table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableInfo {
    /// Family and name.
    pub table: Table,
    /// `flags owner`: only the socket that made the table may change it (firewalld does this).
    pub has_owner: bool,
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainInfo {
    /// Its table.
    pub table: Table,
    /// Its name.
    pub name: String,
    /// Its hook, if it is a base chain.
    pub hook: Option<HookInfo>,
}

/// The hook of a base chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookInfo {
    /// `filter`, `nat` or `route`.
    pub kind: String,
    /// The hook's number, see [`super::Hook::number`].
    pub number: u32,
    /// The chain's place among those of its hook.
    pub priority: i32,
    /// What happens at the chain's end.
    pub policy: Policy,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleInfo {
    /// Its chain.
    pub chain: String,
    /// Its number in the table, for [`super::Batch::delete_rule`].
    pub handle: u64,
    /// Its instructions; equal to [`super::Rule::expressions`] of the rule that was added.
    pub expressions: Vec<Expr>,
    /// Its comment, if it is one of nft's.
    pub comment: Option<String>,
}

/// All tables of all families.
pub fn tables(socket: &mut Socket) -> Result<Vec<TableInfo>, Error> {
    let get = Message::new(GET_TABLE, 0, &header(0), "list nftables tables");
    socket.dump(&get, |received| read_table(&received))
}

/// Reads an `NFT_MSG_NEWTABLE`. Pure.
pub fn read_table(received: &Received<'_>) -> Option<TableInfo> {
    const FLAG_OWNER: u32 = 2;
    let (family, attributes) = open(received)?;
    let name = attributes.find(1)?.text().into_owned();
    let flags = attributes.find(2).and_then(|f| f.be32()).unwrap_or(0);
    Some(TableInfo { table: Table { family, name }, has_owner: flags & FLAG_OWNER != 0 })
}

/// All chains of all tables.
pub fn chains(socket: &mut Socket) -> Result<Vec<ChainInfo>, Error> {
    let get = Message::new(GET_CHAIN, 0, &header(0), "list nftables chains");
    socket.dump(&get, |received| read_chain(&received))
}

/// Reads an `NFT_MSG_NEWCHAIN`. Pure.
pub fn read_chain(received: &Received<'_>) -> Option<ChainInfo> {
    let (family, attributes) = open(received)?;
    let table = Table { family, name: attributes.find(1)?.text().into_owned() };
    let name = attributes.find(3)?.text().into_owned();
    Some(ChainInfo { table, name, hook: read_hook(&attributes) })
}

fn read_hook(chain: &Attributes<'_>) -> Option<HookInfo> {
    let hook = chain.find(4)?.nested();
    Some(HookInfo {
        kind: chain.find(7)?.text().into_owned(),
        number: hook.find(1)?.be32()?,
        priority: i32::from_ne_bytes(hook.find(2)?.be32()?.to_ne_bytes()),
        policy: match chain.find(5).and_then(|p| p.be32()) {
            Some(0) => Policy::Drop,
            _ => Policy::Accept,
        },
    })
}

/// The rules of a chain, in order; empty if there is no such chain or table.
pub fn rules(socket: &mut Socket, table: &Table, chain: &str) -> Result<Vec<RuleInfo>, Error> {
    let mut get = get_rules(table, format!("list rules of chain {table} {chain}"));
    get.attr_str(2, chain);
    read_rules(socket, &get).map(|rules| rules.into_iter().filter(|r| r.chain == chain).collect())
}

/// The rules of all chains of a table, each chain's in order; empty if there is no such table.
pub fn table_rules(socket: &mut Socket, table: &Table) -> Result<Vec<RuleInfo>, Error> {
    read_rules(socket, &get_rules(table, format!("list rules of table {table}")))
}

fn get_rules(table: &Table, what: String) -> Message {
    let mut get = Message::new(GET_RULE, 0, &header(table.family.number()), what);
    get.attr_str(1, &table.name);
    get
}

fn read_rules(socket: &mut Socket, get: &Message) -> Result<Vec<RuleInfo>, Error> {
    or_empty(socket.dump(get, |received| read_rule(&received)))
}

/// Reads an `NFT_MSG_NEWRULE`. Pure.
pub fn read_rule(received: &Received<'_>) -> Option<RuleInfo> {
    let (_, attributes) = open(received)?;
    Some(RuleInfo {
        chain: attributes.find(2)?.text().into_owned(),
        handle: attributes.find(3)?.be64()?,
        expressions: attributes.find(4)?.nested().filter_map(Expr::decode).collect(),
        comment: attributes.find(7).and_then(|u| read_comment(u.value)),
    })
}

fn read_comment(mut userdata: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = userdata {
        let value = rest.get(..usize::from(*length))?;
        if *kind == 0 {
            let end = value.iter().position(|&b| b == 0).unwrap_or(value.len());
            return Some(String::from_utf8_lossy(value.get(..end)?).into_owned());
        }
        userdata = rest.get(usize::from(*length)..)?;
    }
    None
}

/// The keys of a set's elements, as bytes in network order; empty if there is no such set or table.
pub fn elements(socket: &mut Socket, set: &Set) -> Result<Vec<Vec<u8>>, Error> {
    Ok(contents(socket, set)?.iter().map(|element| element.key_bytes().to_vec()).collect())
}

/// The elements of a set or map; empty if there is no such set or table.
pub fn contents(socket: &mut Socket, set: &Set) -> Result<Vec<Element>, Error> {
    let get = get_elements(set, format!("list elements of set {} {}", set.table, set.name));
    or_empty(socket.dump(&get, |received| read_elements(&received)))
        .map(|lists| lists.into_iter().flatten().collect())
}

/// Of these elements those whose keys are in the set or map, with the values that they have there.
pub fn find(socket: &mut Socket, set: &Set, keys: &[Element]) -> Result<Vec<Element>, Error> {
    let ask = |element: &Element| {
        let key = set.key_text(element);
        let mut get = get_elements(set, format!("look up {key} in set {} {}", set.table, set.name));
        get.nest(3, |m| element.key_only().encode(m));
        get
    };
    let mut found = Vec::new();
    let messages = keys.iter().map(ask).collect();
    let each = |received: Received<'_>| found.extend(read_elements(&received).unwrap_or_default());
    for outcome in socket.ask_each(messages, each)? {
        deleted(outcome)?;
    }
    Ok(found)
}

fn get_elements(set: &Set, what: String) -> Message {
    let mut get = Message::new(GET_ELEMENTS, 0, &header(set.table.family.number()), what);
    get.attr_str(1, &set.table.name).attr_str(2, &set.name);
    get
}

/// Reads the elements of an `NFT_MSG_NEWSETELEM`. Pure.
pub fn read_elements(received: &Received<'_>) -> Option<Vec<Element>> {
    let (_, attributes) = open(received)?;
    Some(attributes.find(3)?.nested().filter_map(Element::decode).collect())
}

fn or_empty<T>(result: Result<Vec<T>, Error>) -> Result<Vec<T>, Error> {
    match result {
        Err(error) if error.errno() == Some(rustix::io::Errno::NOENT) => Ok(Vec::new()),
        other => other,
    }
}

fn open<'a>(received: &Received<'a>) -> Option<(TableFamily, Attributes<'a>)> {
    let family = TableFamily::from_number(*received.payload.first()?)?;
    Some((family, Attributes::behind(received.payload, GENERIC_HEADER)))
}
