//! The way out of the agent to the container runtime: CNI binary, blocks file, conflist, in this order, so
//! that a runtime that sees the conflist finds the rest.

use std::collections::BTreeSet;
use std::time::Duration;

use plat_crds::block::{Block, Family};
use plat_crds::cni_conf::PlatPlugin;
use plat_crds::lease::Datapath;
use plat_crds::names::{BLOCKS_FILE, CNI_TYPE, CONFLIST_FILE};

use plat_cni::boot;

use crate::apply::{Done, Outcome, Part};
use crate::conf::{self, BANDWIDTH, Feature, HOST_PORTS, Installed, Lease, Provider};
use crate::desired::Map;
use crate::fabric::Target;
use crate::files::{self, Files};
use crate::folder::{self, Folder};
use crate::incidents::Repair;
use crate::kernel::events::WatchedFolder;
use crate::node::{Error, OwnBlocks, Settings};
use crate::objects::Contact;
use crate::readiness::{Admission, Gate};
use crate::report::CniState;

/// What the CNI binary is allowed.
#[derive(Clone, Copy)]
pub struct Grant<'a> {
    /// The blocks of this node.
    pub own: &'a OwnBlocks,
    /// Until when it may lease.
    pub lease: &'a Lease,
    /// MTU of new pods.
    pub mtu: Option<u32>,
    /// Families of which another block may come.
    pub may_grow: &'a [Family],
}

/// The files, and as what they were written last: one that is gone or differs was changed by another.
pub struct Outlet {
    files: Files,
    node: String,
    plugin: PlatPlugin,
    /// What plugins behind ours provide.
    behind: Vec<Feature>,
    /// Those of them that the last conflist names.
    chained: Vec<String>,
    boot_id: String,
    /// The lease that an earlier life left.
    former: Lease,
    plugin_done: bool,
    blocks_done: Option<String>,
    conflist_done: Option<String>,
    /// What the first conflist waits for.
    gate: Gate,
    opens_at: Option<Duration>,
    early: Option<String>,
    /// What may be leased from, by the blocks file that is there; `None` if the last one could not be written.
    granted: Option<BTreeSet<Block>>,
}

impl Outlet {
    /// The outlet of a node; reads what an earlier life of this boot granted.
    pub fn open(settings: &Settings, boot_id: &str) -> Outlet {
        let files = Files::new(&settings.conf_dir, &settings.bin_dir, &settings.run_dir, &settings.plugin);
        let text = files.run.get(BLOCKS_FILE).ok().flatten().unwrap_or_default();
        let has_conflist = files.conf.path().join(CONFLIST_FILE).exists();
        let providers = [(HOST_PORTS, settings.host_ports), (BANDWIDTH, settings.bandwidth)];
        let by = |provider| {
            let wanted = providers.iter().filter(move |(_, by)| *by == provider);
            wanted.map(|(feature, _)| *feature)
        };
        Outlet {
            former: Lease::of_file(&text, boot_id).unwrap_or_default(),
            files,
            node: settings.me.node.clone(),
            plugin: PlatPlugin {
                datapath: settings.me.datapath,
                bridge: settings.me.bridge.clone(),
                run_dir: settings.run_dir.to_string_lossy().into_owned(),
                anti_spoofing: settings.anti_spoofing,
                capabilities: by(Provider::Plat).map(|feature| feature.capability.to_owned()).collect(),
            },
            behind: by(Provider::Chained).collect(),
            chained: Vec::new(),
            boot_id: boot_id.to_owned(),
            plugin_done: false,
            blocks_done: None,
            conflist_done: None,
            gate: Gate::new(settings.readiness, settings.readiness_deadline, has_conflist),
            opens_at: None,
            early: None,
            granted: None,
        }
    }

    /// The blocks that the CNI binary leases from since the last [`Outlet::write`]; `None` if that is not known.
    pub fn granted(&self) -> Option<BTreeSet<Block>> {
        self.granted.clone()
    }

    /// The folder of the node's state.
    pub fn run(&self) -> &Folder {
        &self.files.run
    }

    /// What to watch.
    pub fn watched(&self) -> Vec<WatchedFolder> {
        self.files.watched()
    }

    /// The names of the files among which the runtime chooses.
    pub fn confs(&self) -> Vec<String> {
        self.files.confs()
    }

    /// Plugins behind ours in the conflist.
    pub fn chained(&self) -> Vec<String> {
        self.chained.clone()
    }

    /// Until when new addresses may be leased: `seconds` from the last contact, or what an earlier life of
    /// this boot granted. It is never moved on without contact.
    pub fn lease(&self, contact: Option<Contact>, seconds: u32) -> Lease {
        match contact {
            Some(contact) => Lease::after(contact.boot_ms, contact.unix, seconds),
            None => self.former.clone(),
        }
    }

    /// Writes what differs. An error that only a restart can heal is one; any other is the state.
    pub fn write(
        &mut self,
        grant: &Grant<'_>,
        map: Map<'_>,
        done: &Done,
        outcome: &mut Outcome,
    ) -> Result<CniState, Error> {
        let own = grant.own;
        self.granted = None;
        self.opens_at = None;
        for folder in [&self.files.conf, &self.files.bin, &self.files.run] {
            // Any other error is met where a file is written.
            if let Err(error) = folder.ensure() {
                words(error)?;
            }
        }
        let installed = self.install_plugin(outcome);
        // Without a block there is no file to make; but one that an earlier life left must not go on granting,
        // whatever else fails.
        let wanted = !own.is_empty() || self.files.run.path().join(BLOCKS_FILE).exists();
        let written = if wanted { self.write_blocks(grant, outcome) } else { Ok(()) };
        if let Err(error) = written {
            return Ok(CniState::BlocksNotWritten(words(error)?));
        }
        self.granted = Some(own.values().filter(|held| held.lease).map(|held| held.cidr).collect());
        if let Err(error) = installed {
            return Ok(CniState::PluginNotInstalled(match error {
                files::Error::Folder(error) => words(error)?,
                error => error.to_string(),
            }));
        }
        if own.is_empty() {
            return Ok(CniState::NoBlock);
        }
        if !is_ready_for_pods(self.plugin.datapath, own, done, outcome) {
            return Ok(CniState::Waiting);
        }
        // Nothing would be leased: a runtime that sees no conflist waits, one that sees it fails each pod.
        if grant.lease.until_boot_ms == 0 {
            return Ok(CniState::Unconfirmed);
        }
        if let Some(waiting) = self.waits_for_peers(map) {
            return Ok(waiting);
        }
        let chain: Vec<(Feature, Installed)> =
            self.behind.iter().map(|feature| (*feature, self.files.installed(*feature))).collect();
        if let Err(error) = self.write_conflist(&chain, outcome) {
            return Ok(CniState::ConflistNotWritten(words(error)?));
        }
        Ok(self.state(&chain, grant.lease))
    }

    fn waits_for_peers(&mut self, map: Map<'_>) -> Option<CniState> {
        match self.gate.admit(&self.node, map, Duration::from_millis(boot::boot_ms())) {
            Admission::Open => None,
            Admission::NoBlock => Some(CniState::NoBlock),
            Admission::Late(words) => {
                self.early = Some(words);
                None
            }
            Admission::Wait { until, names } => {
                self.opens_at = Some(until);
                Some(CniState::Unconverged(names))
            }
        }
    }

    /// When the first conflist will be written, at the latest; on `CLOCK_BOOTTIME`.
    pub fn opens_at(&self) -> Option<Duration> {
        self.opens_at
    }

    /// For whom the first conflist came too early, in words; once.
    pub fn take_early(&mut self) -> Option<String> {
        self.early.take()
    }

    fn install_plugin(&mut self, outcome: &mut Outcome) -> Result<(), files::Error> {
        let written = self.files.install_plugin()?;
        if written && self.plugin_done {
            outcome.repaired(Repair::Plugin, place(&self.files.bin, CNI_TYPE));
        }
        self.plugin_done = true;
        Ok(())
    }

    fn write_blocks(&mut self, grant: &Grant<'_>, outcome: &mut Outcome) -> Result<(), folder::Error> {
        let run = &self.files.run;
        let text = conf::blocks_file(&self.node, &self.boot_id, grant);
        if differs(run, BLOCKS_FILE, self.blocks_done.as_ref())? {
            let there = run.get(BLOCKS_FILE)?.unwrap_or_default();
            match conf::lease_of_another(&there, &text) {
                // Whoever had contact last is right; the other one is not to write its file back.
                Some(until) if until > grant.lease.until_boot_ms => return Ok(()),
                Some(_) => {}
                None => outcome.repaired(Repair::Blocks, place(run, BLOCKS_FILE)),
            }
        }
        self.files.write_blocks(&text)?;
        self.blocks_done = Some(text);
        Ok(())
    }

    fn write_conflist(
        &mut self,
        chain: &[(Feature, Installed)],
        outcome: &mut Outcome,
    ) -> Result<(), folder::Error> {
        if differs(&self.files.conf, CONFLIST_FILE, self.conflist_done.as_ref())? {
            outcome.repaired(Repair::Conflist, place(&self.files.conf, CONFLIST_FILE));
        }
        let text = conf::conflist(&self.plugin, chain);
        self.files.write_conflist(&text)?;
        self.conflist_done = Some(text);
        let present = chain.iter().filter(|(_, installed)| *installed != Installed::Absent);
        self.chained = present.map(|(feature, _)| feature.plugin.to_owned()).collect();
        Ok(())
    }

    fn state(&self, chain: &[(Feature, Installed)], lease: &Lease) -> CniState {
        if let Some(by) = conf::shadowing(&self.files.confs()) {
            return CniState::Shadowed(by.clone());
        }
        if boot::boot_ms() > lease.until_boot_ms {
            return CniState::LeaseExpired(lease.last_contact.clone());
        }
        let lacks = |feature| chain.contains(&(feature, Installed::Absent));
        if lacks(HOST_PORTS) {
            CniState::WithoutPortmap
        } else if lacks(BANDWIDTH) {
            CniState::WithoutBandwidth
        } else {
            CniState::Installed
        }
    }
}

/// Whether the file is not what was written last.
fn differs(folder: &Folder, name: &str, last: Option<&String>) -> Result<bool, folder::Error> {
    let Some(last) = last else { return Ok(false) };
    Ok(folder.get(name)?.as_deref() != Some(last.as_bytes()))
}

fn place(folder: &Folder, name: &str) -> String {
    folder.path().join(name).display().to_string()
}

/// The error in words, unless only a restart can heal it.
fn words(error: folder::Error) -> Result<String, Error> {
    if error.needs_restart() { Err(Error::Folder(error)) } else { Ok(error.to_string()) }
}

/// Whether a new pod would find its way: the table, the bridge with the own blocks' routes, or their gateways where
/// there is no bridge, are in place.
fn is_ready_for_pods(datapath: Datapath, own: &OwnBlocks, done: &Done, outcome: &Outcome) -> bool {
    let joined = |block: &Block| match datapath {
        Datapath::Bridge => {
            done.routes.values().any(|route| route.key.prefix == *block && route.target == Target::Bridge)
        }
        Datapath::Routed => done.gateways.contains(block),
    };
    let fine = |part| !outcome.troubles.contains_key(&part);
    let parts = [Part::Table, Part::Bridge, Part::Gateways, Part::Sysctl];
    parts.into_iter().all(fine) && own.keys().all(joined)
}
