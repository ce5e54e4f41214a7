//! Who asked the API server for what, from the audit log of a control plane that was started with
//! [`ControlPlane::audited`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::PathBuf;

use anyhow::Result;
use serde::Deserialize;

use crate::light::ControlPlane;

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Request {
    /// `create`, `patch`, `update`, `delete`, `get`, `list`, `watch`, …
    pub verb: String,
    /// Resource in the plural, and subresource if there is one: `podcidrs`, `podcidrs/status`.
    pub resource: String,
}

impl Request {
    /// Whether it wants to change something.
    pub fn is_write(&self) -> bool {
        matches!(self.verb.as_str(), "create" | "update" | "patch" | "delete" | "deletecollection")
    }
}

/// Answered requests, by kind.
pub type Counts = BTreeMap<Request, usize>;

/// Counts requests by kind.
pub fn count(requests: &[Request]) -> Counts {
    let mut counts = Counts::new();
    for request in requests {
        *counts.entry(request.clone()).or_default() += 1;
    }
    counts
}

/// How many of them are writes.
pub fn writes(requests: &[Request]) -> usize {
    requests.iter().filter(|request| request.is_write()).count()
}

/// The log, read on from where the last reading ended.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    offset: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    verb: String,
    stage: String,
    user: User,
    #[serde(default)]
    object_ref: Option<ObjectRef>,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    username: String,
}

#[derive(Deserialize)]
struct ObjectRef {
    #[serde(default)]
    resource: String,
    #[serde(default)]
    subresource: String,
}

impl Log {
    /// The log of a control plane, from its beginning.
    pub fn of(plane: &ControlPlane) -> Log {
        Log { path: plane.run_folder().join("cp/audit.log"), offset: 0 }
    }

    /// What a user has asked for since the last call, in the order of the answers, leader Leases aside. Refused
    /// requests are among it.
    pub fn since(&mut self, user: &str) -> Result<Vec<Request>> {
        let mut file = BufReader::new(File::open(&self.path)?);
        file.seek(SeekFrom::Start(self.offset))?;
        let mut requests = Vec::new();
        let mut text = String::new();
        loop {
            text.clear();
            let read = file.read_line(&mut text)?;
            // A line that is just being written is read next time.
            if read == 0 || !text.ends_with('\n') {
                return Ok(requests);
            }
            self.offset += u64::try_from(read)?;
            requests.extend(request_of(serde_json::from_str(&text)?, user));
        }
    }
}

/// The request of a line, if it is that user's.
fn request_of(line: Line, user: &str) -> Option<Request> {
    // A watch is answered when it starts and again when it ends.
    let answered = if line.verb == "watch" { "ResponseStarted" } else { "ResponseComplete" };
    let object = line.object_ref?;
    if line.user.username != user || line.stage != answered || object.resource == "leases" {
        return None;
    }
    let resource = match object.subresource.as_str() {
        "" => object.resource,
        sub => format!("{}/{sub}", object.resource),
    };
    Some(Request { verb: line.verb, resource })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_of_one_user_are_counted_once_and_leases_not_at_all() {
        let line = |user: &str, verb: &str, stage: &str, resource: &str| {
            serde_json::from_value(serde_json::json!({
                "stage": stage, "verb": verb, "user": {"username": user},
                "objectRef": {"resource": resource, "subresource": "status"},
            }))
            .unwrap()
        };
        let lines = [
            line("a", "patch", "ResponseComplete", "podcidrs"),
            line("b", "patch", "ResponseComplete", "podcidrs"),
            line("a", "update", "ResponseComplete", "leases"),
            line("a", "watch", "ResponseStarted", "nodes"),
            line("a", "watch", "ResponseComplete", "nodes"),
        ];
        let requests: Vec<_> = lines.into_iter().filter_map(|line| request_of(line, "a")).collect();
        let request =
            |verb: &str, resource: &str| Request { verb: verb.to_owned(), resource: resource.to_owned() };
        assert_eq!(requests, [request("patch", "podcidrs/status"), request("watch", "nodes/status")]);
        assert_eq!((writes(&requests), count(&requests).len()), (1, 2));
    }
}
