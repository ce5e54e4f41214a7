//! A node to measure on: namespaces of this program's own, with what the agent would have written.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{fs, io};

use plat_crds::blocks_file::{BLOCKS_FILE_VERSION, BlocksFile, HeldBlock};
use plat_crds::lease::{
    HostVeth, Lease, LeasedAddress, Pool, Since, entry_offset, record_offset, {self as format},
};
use plat_crds::names;
use rustix::time::{ClockId, clock_gettime};

use crate::Result;
use crate::contender::Contender;

/// Runs this program again in namespaces of its own, which end with it.
pub fn enter() -> Result<()> {
    let status = Command::new("unshare")
        .args(["--mount", "--net", "--propagation", "private", "--"])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .arg("--inside")
        .status()?;
    if status.success() { Ok(()) } else { Err(format!("the measurement failed: {status}").into()) }
}

/// Makes the namespace a node: its own /run and /var/lib/cni, forwarding on, a bridge for each floor.
pub fn prepare(floor_bridges: &[(&str, &str)]) -> Result<()> {
    for folder in ["/run", "/var/lib/cni"] {
        fs::create_dir_all(folder)?;
        run(Command::new("mount").args(["-t", "tmpfs", "tmpfs", folder]))?;
    }
    run(Command::new("ip").args(["link", "set", "lo", "up"]))?;
    for switch in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        fs::write(Path::new("/proc/sys/net").join(switch), "1")?;
    }
    for (bridge, net) in floor_bridges {
        run(Command::new("ip").args(["link", "add", bridge, "type", "bridge"]))?;
        run(Command::new("ip").args(["addr", "add", &format!("{net}.0.1/16"), "dev", bridge]))?;
        run(Command::new("ip").args(["link", "set", bridge, "up"]))?;
    }
    Ok(())
}

/// Makes a folder that the CNI binary can lease from, with these blocks and so many leases held.
pub fn run_dir(name: &str, blocks: &[&str], held: u32) -> Result<PathBuf> {
    let dir = Path::new("/run/plat").join(name);
    fs::create_dir_all(&dir)?;
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    let held_block = |cidr: &&str| Ok(HeldBlock { cidr: cidr.parse()?, lease: true });
    let file = BlocksFile {
        version: BLOCKS_FILE_VERSION,
        node: "bench".to_owned(),
        boot_id: boot_id.clone(),
        lease_until: boot_time_ms() + 3_600_000,
        last_contact: "2026-01-01T00:00:00Z".to_owned(),
        may_grow: Vec::new(),
        mtu: None,
        blocks: blocks.iter().map(held_block).collect::<Result<_>>()?,
    };
    fs::write(dir.join(names::BLOCKS_FILE), serde_json::to_vec(&file)?)?;
    if held > 0 {
        fs::write(dir.join(names::LEASES_FILE), store(&boot_id, &file, held)?)?;
    }
    Ok(dir)
}

/// A lease store with that many leases of the first block's first addresses.
fn store(boot_id: &str, file: &BlocksFile, held: u32) -> Result<Vec<u8>> {
    let block = file.blocks.first().ok_or("no block to lease from")?.cidr;
    let mut bytes = vec![0; usize::try_from(record_offset(held))?];
    let mut put = |offset: u64, part: &[u8]| -> Result<()> {
        let at = usize::try_from(offset)?;
        let place = bytes.get_mut(at..at + part.len()).ok_or("a lease lies outside of the store")?;
        place.copy_from_slice(part);
        Ok(())
    };
    for slot in 0..held {
        // Behind the gateway.
        let address = block.host(slot + 2).ok_or("the block is too small")?;
        let lease = Lease {
            container_id: format!("held{slot}"),
            ifname: "eth0".to_owned(),
            network: Some(names::CNI_NETWORK.to_owned()),
            pool: Pool::Blocks,
            addresses: vec![LeasedAddress {
                address,
                subnet_length: block.net().prefix_len(),
                masquerade: false,
            }],
            veth: HostVeth::default(),
            netns: None,
            since: Since::default(),
            ..Lease::default()
        };
        let (entry, record) = lease.encode()?;
        put(entry_offset(slot), &entry)?;
        put(record_offset(slot), &record)?;
    }
    let id = u128::from_str_radix(&boot_id.replace('-', ""), 16)?.to_be_bytes();
    put(0, &format::Header { boot_id: id, slots: held, leases: held }.encode())?;
    Ok(bytes)
}

fn boot_time_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}

/// Makes the namespaces of a contender's first pods.
pub fn make_namespaces(contender: &Contender, pods: usize) -> Result<()> {
    namespaces("add", contender, pods)
}

/// Removes them.
pub fn remove_namespaces(contender: &Contender, pods: usize) -> Result<()> {
    namespaces("del", contender, pods)
}

fn namespaces(verb: &str, contender: &Contender, pods: usize) -> Result<()> {
    let lines: String = (0..pods).map(|n| format!("netns {verb} {}\n", contender.pod(n))).collect();
    let mut ip = Command::new("ip");
    let mut child = ip.args(["-batch", "-"]).stdin(Stdio::piped()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        io::Write::write_all(&mut stdin, lines.as_bytes())?;
    }
    if child.wait()?.success() { Ok(()) } else { Err(format!("ip netns {verb} failed").into()) }
}

fn run(command: &mut Command) -> Result<()> {
    let out = command.output()?;
    if out.status.success() {
        return Ok(());
    }
    Err(format!("{command:?} failed: {}", String::from_utf8_lossy(&out.stderr)).into())
}
