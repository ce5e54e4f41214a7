//! What the runtime asks: verb, container, namespace and interface from the environment (CNI spec §2).
//!
//! Pure: the environment comes in as a function from name to value. Checks go in the reference's order, so
//! that runtimes get the errors they know: an invalid value fails at once, all missing ones are listed.

use plat_crds::lease::MAX_CONTAINER_ID;

use crate::error::{Code, Error};

/// The verbs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Connect a container.
    Add,
    /// Disconnect it.
    Del,
    /// Check that it is connected as ADD left it.
    Check,
    /// Say whether ADD could be served.
    Status,
    /// Remove what no container holds any more.
    Gc,
    /// Say which versions are supported.
    Version,
}

impl Verb {
    const ALL: [(&'static str, Verb); 6] = [
        ("ADD", Verb::Add),
        ("DEL", Verb::Del),
        ("CHECK", Verb::Check),
        ("STATUS", Verb::Status),
        ("GC", Verb::Gc),
        ("VERSION", Verb::Version),
    ];

    /// Reads `CNI_COMMAND`.
    pub fn parse(text: &str) -> Result<Verb, Error> {
        if let Some((_, verb)) = Verb::ALL.iter().find(|(name, _)| *name == text) {
            return Ok(*verb);
        }
        let known = Verb::ALL.map(|(name, _)| name).join(", ");
        let details = match text {
            // Old tutorials list the verbs as ADD, DEL, GET, VERSION.
            "GET" => format!("there is no GET; CHECK is the verb that looks at a container (known: {known})"),
            _ => format!("known are {known}"),
        };
        Err(Error::because(Code::Environment, format!("unknown CNI_COMMAND: {text}"), details))
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Verb::ALL.iter().find(|(_, verb)| *verb == self).map_or("", |(name, _)| name)
    }

    fn needs_container(self) -> bool {
        matches!(self, Verb::Add | Verb::Del | Verb::Check)
    }
}

/// Which container and interface, where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Container {
    /// The runtime's ID of the sandbox.
    pub id: String,
    /// Path of its network namespace; empty if a DEL comes without.
    pub netns: String,
    /// The interface in it.
    pub ifname: String,
    /// What `CNI_ARGS` asks for.
    pub args: Args,
}

/// The keys of `CNI_ARGS` that mean something to us; all others are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    /// `IP=`: addresses, with or without prefix length.
    pub ips: Vec<String>,
    /// `MAC=`.
    pub mac: Option<String>,
}

/// A variable's value; `None` if it is unset or not UTF-8 (no valid value is not).
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Reads and checks the variables that the verb uses. What it does not use is not looked at: libcni sends
/// dummies with VERSION and empty ones with STATUS and GC.
pub fn read_container(verb: Verb, environment: Environment<'_>) -> Result<Container, Error> {
    if !verb.needs_container() {
        return Ok(Container::default());
    }
    let value = |name| environment(name).unwrap_or_default();
    let container = Container {
        id: value("CNI_CONTAINERID"),
        netns: value("CNI_NETNS"),
        ifname: value("CNI_IFNAME"),
        args: Args::parse(&value("CNI_ARGS")),
    };
    let mut missing = Vec::new();
    if container.id.is_empty() {
        missing.push("CNI_CONTAINERID");
    } else {
        check_container_id(&container.id)?;
    }
    if container.netns.is_empty() && verb != Verb::Del {
        missing.push("CNI_NETNS");
    }
    if container.ifname.is_empty() {
        missing.push("CNI_IFNAME");
    } else {
        check_ifname(&container.ifname)?;
    }
    if missing.is_empty() {
        return Ok(container);
    }
    let msg = "required environment variables are missing";
    Err(Error::because(Code::Environment, msg, format!("{}: set {}", verb.name(), missing.join(", "))))
}

/// Whether a text has the characters of container IDs and network names: `^[A-Za-z0-9][A-Za-z0-9_.-]*$`.
pub fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

fn check_container_id(id: &str) -> Result<(), Error> {
    if !is_name(id) {
        let msg = format!("invalid CNI_CONTAINERID: {id:?}");
        let details = "it must be letters, digits, '_', '.' and '-', and start with a letter or digit";
        return Err(Error::because(Code::Environment, msg, details));
    }
    if id.len() > MAX_CONTAINER_ID {
        let msg = format!("CNI_CONTAINERID is longer than {MAX_CONTAINER_ID} bytes");
        return Err(Error::because(Code::Environment, msg, format!("it has {}", id.len())));
    }
    Ok(())
}

/// The kernel's rules (`dev_valid_name`), and no white space of Unicode either.
pub fn check_ifname(name: &str) -> Result<(), Error> {
    let problem = if name.len() > 15 {
        "it is longer than 15 bytes"
    } else if name == "." || name == ".." {
        "it is a folder's name"
    } else if name.contains(['/', ':']) {
        "it contains '/' or ':'"
    } else if name.contains(|c: char| c.is_whitespace() || c.is_control()) {
        "it contains white space or control characters"
    } else {
        return Ok(());
    };
    Err(Error::because(Code::Environment, format!("invalid CNI_IFNAME: {name:?}"), problem))
}

impl Args {
    /// Reads `K=V;K=V`. Go's plugins refuse what they do not know; we ignore it, as every runtime sends
    /// something of its own.
    pub fn parse(text: &str) -> Args {
        let mut args = Args::default();
        for (key, value) in text.split(';').filter_map(|pair| pair.split_once('=')) {
            match key {
                "IP" => {
                    args.ips = value
                        .split(',')
                        .map(str::trim)
                        .filter(|v| !v.is_empty())
                        .map(str::to_owned)
                        .collect();
                }
                "MAC" => args.mac = Some(value.to_owned()).filter(|v| !v.is_empty()),
                _ => {}
            }
        }
        args
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(verb: Verb, variables: &[(&str, &str)]) -> Result<Container, Error> {
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        read_container(verb, &find)
    }

    const GOOD: [(&str, &str); 3] = [("CNI_CONTAINERID", "a"), ("CNI_NETNS", "/n"), ("CNI_IFNAME", "eth0")];

    #[test]
    fn all_missing_variables_are_listed_in_one_error() {
        let error = read(Verb::Add, &[("CNI_NETNS", "")]).unwrap_err();
        assert_eq!(error.code, 4);
        assert_eq!(error.details, "ADD: set CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME");
        let error = read(Verb::Del, &[]).unwrap_err();
        assert_eq!(error.details, "DEL: set CNI_CONTAINERID, CNI_IFNAME");
    }

    #[test]
    fn verbs_without_a_container_do_not_look_at_its_variables() {
        for verb in [Verb::Status, Verb::Gc, Verb::Version] {
            assert_eq!(read(verb, &[("CNI_IFNAME", "a/b")]), Ok(Container::default()));
        }
    }

    #[test]
    fn container_ids_follow_the_specification() {
        for good in ["a", "A_1.b-c", "0", &"c".repeat(MAX_CONTAINER_ID)] {
            assert!(read(Verb::Add, &[GOOD[1], GOOD[2], (GOOD[0].0, good)]).is_ok(), "{good}");
        }
        for bad in ["-a", ".a", "a/b", "a b", "ä", "a\n", &"c".repeat(MAX_CONTAINER_ID + 1)] {
            let error = read(Verb::Add, &[GOOD[1], GOOD[2], (GOOD[0].0, bad)]).unwrap_err();
            assert_eq!(error.code, 4, "{bad}");
        }
    }

    #[test]
    fn interface_names_follow_the_kernel() {
        for good in ["e", "eth0", "net1.100", "ens15charslong1", "a-b_c", "ä"] {
            assert!(check_ifname(good).is_ok(), "{good}");
        }
        for bad in
            [".", "..", "a/b", "a:b", "a\tb", "a b", "a\u{a0}b", "sixteen-bytes-xy", "ääääääää", "a\u{1}"]
        {
            assert_eq!(check_ifname(bad).unwrap_err().code, 4, "{bad}");
        }
    }

    #[test]
    fn the_verb_of_old_tutorials_is_answered_with_check() {
        let error = Verb::parse("GET").unwrap_err();
        assert_eq!((error.code, error.msg.as_str()), (4, "unknown CNI_COMMAND: GET"));
        assert!(error.details.contains("CHECK"), "{error}");
        assert!(Verb::parse("NOPE").unwrap_err().to_string().contains("NOPE"));
        assert!(Verb::parse("add").is_err(), "verbs are upper case");
    }

    #[test]
    fn arguments_are_read_in_any_order_and_unknown_ones_ignored() {
        let args = Args::parse(
            "K8S_POD_NAME=x;IP=10.1.0.5/24,fd00::5;a=b=c;;MAC=0a:00:00:00:00:01;IgnoreUnknown=1;junk;",
        );
        assert_eq!(args.ips, ["10.1.0.5/24", "fd00::5"]);
        assert_eq!(args.mac.as_deref(), Some("0a:00:00:00:00:01"));
        assert_eq!(Args::parse("ip=10.1.0.5"), Args::default(), "keys are case-sensitive");
    }

    proptest! {
        #[test]
        fn no_environment_causes_a_panic(id: String, netns: String, ifname: String, args: String) {
            let variables = [("CNI_CONTAINERID", id.as_str()), ("CNI_NETNS", &netns), ("CNI_IFNAME", &ifname), ("CNI_ARGS", &args)];
            for (_, verb) in Verb::ALL {
                let _ = read(verb, &variables);
            }
        }
    }
}
