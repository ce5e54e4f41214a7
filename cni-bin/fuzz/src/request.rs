//! The environment: variables as `/proc/<pid>/environ` has them, `NAME=value` with a zero byte behind each.

use plat_cni::config::{Attachment, Network};
use plat_cni::request::{Args, Container, Verb, is_name, read_container};
use plat_cni::wire::host_name;
use plat_crds::alias::{self, MAX_ALIAS};
use plat_crds::lease::{Entry, Lease, MAX_CONTAINER_ID};

use super::must_be_reportable;

/// Each verb takes it or says why not; what is taken can be written into the kernel and the lease store and
/// is found again by that.
pub fn check(input: &[u8]) {
    let find = |name: &str| {
        let pairs = input.split(|byte| *byte == 0).filter_map(|pair| pair.strip_prefix(name.as_bytes()));
        let value = pairs.filter_map(|rest| rest.strip_prefix(b"=")).next()?;
        String::from_utf8(value.to_vec()).ok()
    };
    match Verb::parse(&find("CNI_COMMAND").unwrap_or_default()) {
        Ok(verb) => assert_eq!(Verb::parse(verb.name()), Ok(verb)),
        Err(error) => must_be_reportable(&error),
    }
    for verb in [Verb::Add, Verb::Del, Verb::Check, Verb::Status, Verb::Gc, Verb::Version] {
        match read_container(verb, &find) {
            Err(error) => {
                assert_eq!(error.code, 4, "{error:?}");
                must_be_reportable(&error);
            }
            Ok(container) if container == Container::default() => {}
            Ok(container) => must_be_usable(&container),
        }
    }
}

fn must_be_usable(container: &Container) {
    let Container { id, ifname, args, .. } = container;
    assert!(is_name(id) && id.len() <= MAX_CONTAINER_ID);
    assert!(ifname.len() <= 15 && !ifname.contains(['\0', '/']));
    assert!((0..3).all(|attempt| host_name(id, ifname, attempt).len() == 12));

    let lease = super::lease::of(id, ifname, &[[10, 244, 3, 7].into()]);
    let alias = alias::of(&lease, None);
    assert!(alias.len() <= MAX_ALIAS && alias::is_of(&alias, id, ifname), "{alias}");
    let (entry, record) = lease.encode().unwrap();
    let Entry::Used(entry) = Entry::decode(&entry) else { panic!("{entry:?}") };
    assert_eq!(Lease::decode(&entry, &record), Some(lease));

    let written = format!("IP={};MAC={}", args.ips.join(","), args.mac.as_deref().unwrap_or_default());
    assert_eq!(Args::parse(&written), *args, "{written:?}");
    let network = Network::parse(br#"{"name":"n"}"#).unwrap();
    match Attachment::parse(&network, args) {
        Ok(attachment) => assert_eq!(attachment.requested_ips.len(), args.ips.len()),
        Err(error) => must_be_reportable(&error),
    }
}
