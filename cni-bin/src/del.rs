//! DEL: the link, then the rules and the lease; by container and interface alone, as often as the runtime likes.
//!
//! Missing interface, namespace, state, configuration of the ADD or `prevResult`: all fine. An error is
//! returned only if something of ours remains and another try could help. It never contains "not found" or
//! "no such file or directory": containerd takes those for success.

use plat_crds::lease::Lease;

use crate::acquire;
use crate::add::delegate_of;
use crate::call::Call;
use crate::error::Error;
use crate::fail;
use crate::pods::Remover;
use crate::store::{Held, Kernel};
use crate::{delegate, foreign, predecessor, teardown};

/// Disconnects a container.
pub fn del(call: &mut Call) -> Result<(), Error> {
    disconnect(call).map_err(reword)
}

/// Takes the words out of an error that containerd would take for success.
fn reword(error: Error) -> Error {
    let calm = |text: String| {
        ["not found", "no such file or directory", "No such file or directory"]
            .iter()
            .fold(text, |text, words| text.replace(words, "missing"))
    };
    Error { code: error.code, msg: calm(error.msg), details: calm(error.details) }
}

fn disconnect(call: &mut Call) -> Result<(), Error> {
    let container = call.container.clone();
    // A store that cannot be used now does not keep the link from going; its lease waits for another try.
    let looked_up = find_lease(call);
    let lease = looked_up.as_ref().ok().and_then(Option::as_ref).map(|held| held.lease.clone());
    let lease = lease.or_else(|| unrecorded(call));
    fail::point("del-start")?;
    if let Some(lease) = lease.as_ref().filter(|lease| foreign::is_foreign(lease)) {
        predecessor::end(call, lease);
    }
    let mut rules = Remover::default();
    let proven =
        teardown::teardown(call.host(), &container.id, &container.ifname, lease.as_ref(), &mut rules)?;
    fail::point("del-link")?;
    // Only now: an address must not be handed out while a link still has it.
    match looked_up? {
        Some(held) => acquire::release(call, &held, &mut rules)?,
        None => proven.map_or(Ok(()), |lease| acquire::forget_unrecorded(call, &lease, &mut rules))?,
    }
    fail::point("del-lease")?;
    if let Some(plugin) = delegate_of(call) {
        delegate::run(&plugin, &call.plugin_path, "DEL", &call.input)?;
    }
    Ok(())
}

/// A pod that another network attached and whose lease is not recorded, as it came after the agent's last look or the
/// store was lost.
fn unrecorded(call: &mut Call) -> Option<Lease> {
    let container = call.container.clone();
    let mut foreign = call.kernel.foreign(&[]).unwrap_or_default().into_iter();
    foreign.find(|lease| (&lease.container_id, &lease.ifname) == (&container.id, &container.ifname))
}

fn find_lease(call: &mut Call) -> Result<Option<Held>, Error> {
    let container = call.container.clone();
    let Some(mut store) = call.lock_existing_store()? else { return Ok(None) };
    Ok(store.find(&container.id, &container.ifname)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    fn an_error_does_not_look_like_success_to_containerd() {
        let error = Error::because(Code::Delegate, "x: not found", "open /x: no such file or directory");
        assert_eq!(reword(error).to_string(), "x: missing: open /x: missing");
    }
}
