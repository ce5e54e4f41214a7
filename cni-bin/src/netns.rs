//! Network namespaces: the pod's, by the path that the runtime gives, and our own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use plat_crds::lease::NetnsId;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::error::{Code, Error};

/// `NSFS_MAGIC`: the file system type of a namespace's file.
const NSFS: i64 = 0x6e73_6673;
const OWN: &str = "/proc/thread-self/ns/net";

/// A pod's network namespace, open, and the one that we came from; both live as long as this.
#[derive(Debug)]
pub struct Netns {
    pod: Handle,
    own: Handle,
}

#[derive(Debug)]
struct Handle {
    file: File,
    id: NetnsId,
}

impl Netns {
    /// Opens the pod's namespace. A path that leads nowhere, or not to a network namespace, is an error
    /// of its own (8), which tells the runtime what was wrong.
    pub fn open(path: &str) -> Result<Netns, Error> {
        let invalid = |why: String| Error::because(Code::Netns, format!("cannot use CNI_NETNS {path}"), why);
        let pod = Handle::open(Path::new(path)).map_err(|e| invalid(e.kind().to_string()))?;
        let magic = rustix::fs::fstatfs(&pod.file).map_err(|e| invalid(e.to_string()))?.f_type;
        if magic != NSFS {
            return Err(invalid("it is not a namespace".to_owned()));
        }
        let own = Handle::open(Path::new(OWN))
            .map_err(|e| Error::because(Code::Io, "cannot open the host's network namespace", e.kind()))?;
        let netns = Netns { pod, own };
        // A namespace of another kind (uts, ipc) cannot be entered as this one.
        netns.inside(|| Ok(()))?;
        Ok(netns)
    }

    /// Which namespace it is, as long as it is open.
    pub fn id(&self) -> NetnsId {
        self.pod.id
    }

    /// Whether it is the namespace that we came from.
    pub fn is_own(&self) -> bool {
        self.pod.id == self.own.id
    }

    /// Runs `work` inside the namespace, on this thread, and comes back. Sockets that `work` opens stay
    /// there, so it should do only what needs the thread itself: open them and write sysctls. Not being
    /// able to come back is an error even if `work` went well: nothing that follows would be right.
    pub fn inside<T>(&self, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        enter(&self.pod, "enter the pod's network namespace")?;
        let result = work();
        enter(&self.own, "leave the pod's network namespace")?;
        result
    }
}

impl Handle {
    fn open(path: &Path) -> io::Result<Handle> {
        let file = File::open(path)?;
        let stat = rustix::fs::fstat(&file)?;
        Ok(Handle { file, id: NetnsId { device: stat.st_dev, inode: stat.st_ino } })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pod.file.as_fd()
    }
}

fn enter(netns: &Handle, what: &str) -> Result<(), Error> {
    move_into_link_name_space(netns.file.as_fd(), Some(LinkNameSpaceType::Network)).map_err(|errno| {
        let why = io::Error::from(errno).kind();
        Error::because(Code::Netns, format!("cannot {what}"), why)
    })
}
