//! `plat leases`: who holds which address since when, for people and for programs.

use std::path::PathBuf;
use std::time::Duration;

use plat_crds::lease::Lease;
use plat_crds::names::{LEASES_FILE, RUN_DIR};
use serde_json::json;

use crate::boot::BootId;
use crate::error::{Code, Error};
use crate::kernel::HostKernel;
use crate::netlink::{Protocol, Socket};
use crate::store::{Missing, Store};

/// How long to wait for the store's lock.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// What `plat leases --help` says.
pub const USAGE: &str = "usage: plat leases [--json] [--run-dir DIR]

Prints the leases of this node: address, container, interface, network, host interface, since when.
  --json         one JSON object with all that is recorded
  --run-dir DIR  where the lease store is (default /run/plat)

The store is repaired from the kernel if it is damaged, as an ADD would do.";

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Table,
    Json,
}

/// Runs the command and returns what to print.
pub fn run(arguments: &[String]) -> Result<String, Error> {
    let mut format = Format::Table;
    let mut dir = PathBuf::from(RUN_DIR);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--json" => format = Format::Json,
            "--help" | "-h" => return Ok(USAGE.to_owned()),
            "--run-dir" => {
                dir = rest.next().map(PathBuf::from).ok_or_else(|| usage("--run-dir needs a folder"))?
            }
            other => match other.strip_prefix("--run-dir=") {
                Some(value) => dir = PathBuf::from(value),
                None => return Err(usage(&format!("unknown argument {other}"))),
            },
        }
    }
    let leases = read(&Store::at(&dir.join(LEASES_FILE)))?;
    Ok(match format {
        Format::Table => table(&leases),
        Format::Json => json!({ "leases": leases }).to_string(),
    })
}

fn usage(problem: &str) -> Error {
    Error::because(Code::Environment, problem, USAGE)
}

fn read(store: &Store) -> Result<Vec<Lease>, Error> {
    let boot = BootId::read().map_err(|e| Error::because(Code::Io, "cannot read the boot id", e))?;
    let mut kernel = HostKernel::new(Socket::open(Protocol::Route)?);
    let leases = match store.lock(&boot, LOCK_TIMEOUT, Missing::Leave, &mut kernel)? {
        Some(mut locked) => locked.all()?,
        None => Vec::new(),
    };
    Ok(sorted(leases))
}

fn sorted(mut leases: Vec<Lease>) -> Vec<Lease> {
    leases
        .sort_by_key(|l| (l.addresses.first().map(|a| a.address), l.container_id.clone(), l.ifname.clone()));
    leases
}

/// One line per lease, columns as wide as they must be. Pure.
fn table(leases: &[Lease]) -> String {
    let mut rows =
        vec![["ADDRESS", "CONTAINER", "INTERFACE", "NETWORK", "HOST INTERFACE", "SINCE"].map(str::to_owned)];
    for lease in leases {
        let addresses: Vec<String> = lease.addresses.iter().map(|a| a.address.to_string()).collect();
        rows.push([
            if addresses.is_empty() { "-".to_owned() } else { addresses.join(",") },
            lease.container_id.clone(),
            lease.ifname.clone(),
            lease.network.clone().unwrap_or_else(|| "?".to_owned()),
            lease.veth.name.clone(),
            utc(lease.since.unix_seconds),
        ]);
    }
    let widths: Vec<usize> = (0..6)
        .map(|column| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0))
        .collect();
    let line = |row: &[String; 6]| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Seconds since 1970 as RFC 3339 in UTC. Pure.
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days into years of 146,097-day cycles that start on 1 March, so that leap days come last.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest % 3600 / 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use plat_crds::lease::{HostVeth, LeasedAddress, Pool, Since};

    #[test]
    fn dates_are_right_over_leap_years_and_centuries() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_210_096, "2024-02-29T12:34:56Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }

    #[test]
    fn the_table_lines_up() {
        let lease = Lease {
            container_id: "c1".into(),
            ifname: "eth0".into(),
            network: None,
            pool: Pool::Blocks,
            addresses: vec![LeasedAddress {
                address: [10, 244, 3, 7].into(),
                subnet_length: 24,
                masquerade: false,
            }],
            veth: HostVeth { name: "plat0badcafe".into(), index: 3 },
            netns: None,
            since: Since::default(),
            ..Lease::default()
        };
        assert_eq!(
            table(&[lease]),
            "ADDRESS     CONTAINER  INTERFACE  NETWORK  HOST INTERFACE  SINCE\n\
             10.244.3.7  c1         eth0       ?        plat0badcafe    1970-01-01T00:00:00Z"
        );
    }

    #[test]
    fn an_unknown_argument_is_answered_with_the_usage() {
        assert!(run(&["--yaml".to_owned()]).unwrap_err().to_string().contains("usage: plat leases"));
    }
}
