//! The node's files: CNI binary, blocks file, conflist; and what else is in their folders.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use plat_crds::names::{
    BLOCKS_FILE, CNI_TYPE, CONFLIST_FILE, LEASES_FILE, MAP_FILE, ROLLOUT_FILE, SYSCTLS_FILE,
};

use crate::conf::{self, BANDWIDTH, Feature, HOST_PORTS, Installed};
use crate::folder::{self, Folder};
use crate::kernel::events::{self, WatchedFolder};

/// How long a foreign plugin may take to say its versions.
const PLUGIN_TIMEOUT: Duration = Duration::from_secs(3);
/// More than any plugin's answer to VERSION.
const MAX_ANSWER: u64 = 16 * 1024;

/// Why the CNI binary could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image lacks it.
    #[error("read the CNI binary {}: {source}; give the path of 'plat' in this image with --plugin", path.display())]
    Source {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The folder refuses it.
    #[error(transparent)]
    Folder(#[from] folder::Error),
}

/// Enough of a file's metadata to see that it was not touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    mode: u32,
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Stamp> {
        fs::symlink_metadata(path).ok().map(|meta| Stamp::read(&meta))
    }

    fn read(meta: &Metadata) -> Stamp {
        Stamp {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            mode: meta.mode(),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// The folders, and what was last seen in them.
pub struct Files {
    /// `/etc/cni/net.d`
    pub conf: Folder,
    /// `/opt/cni/bin`
    pub bin: Folder,
    /// `/run/plat`
    pub run: Folder,
    plugin: PathBuf,
    /// The binary in the image and the installed one, when they were last found equal.
    equal: Option<(Stamp, Stamp)>,
    /// The plugins of others that were asked for their versions.
    asked: BTreeMap<&'static str, (Stamp, Installed)>,
}

impl Files {
    /// Files in those folders; `plugin` is the CNI binary in this image.
    pub fn new(conf: &Path, bin: &Path, run: &Path, plugin: &Path) -> Files {
        Files {
            conf: Folder::new(conf),
            bin: Folder::new(bin),
            run: Folder::new(run),
            plugin: plugin.to_owned(),
            equal: None,
            asked: BTreeMap::new(),
        }
    }

    /// What to watch in the folders.
    pub fn watched(&self) -> Vec<WatchedFolder> {
        let ours_in_run = [BLOCKS_FILE, MAP_FILE, ROLLOUT_FILE, SYSCTLS_FILE, LEASES_FILE];
        events::folders(
            self.conf.path(),
            self.bin.path(),
            self.run.path(),
            &[CNI_TYPE, HOST_PORTS.plugin, BANDWIDTH.plugin],
            &ours_in_run,
        )
    }

    /// Makes `/opt/cni/bin/plat` the binary of this image; returns whether it was another one.
    pub fn install_plugin(&mut self) -> Result<bool, Error> {
        let target = self.bin.path().join(CNI_TYPE);
        let stamps = || Stamp::of(&self.plugin).zip(Stamp::of(&target));
        if self.equal.is_some() && self.equal == stamps() {
            return Ok(false);
        }
        let binary =
            fs::read(&self.plugin).map_err(|source| Error::Source { path: self.plugin.clone(), source })?;
        let written = self.bin.put(CNI_TYPE, &binary, 0o755)?;
        self.equal = stamps();
        Ok(written)
    }

    /// What the node has of the reference plugin for a feature. It is run once for each version of the file,
    /// without input and with a time limit; any failure means the older CNI spec.
    pub fn installed(&mut self, feature: Feature) -> Installed {
        let path = self.bin.path().join(feature.plugin);
        let Ok(meta) = fs::metadata(&path) else { return Installed::Absent };
        let stamp = Stamp::read(&meta);
        if !meta.is_file() || stamp.mode & 0o111 == 0 {
            return Installed::Absent;
        }
        match self.asked.get(feature.plugin) {
            Some((seen, installed)) if *seen == stamp => *installed,
            _ => {
                let answer = versions_of(&path).unwrap_or_default();
                let installed = if conf::speaks_1_1(&answer) { Installed::Spec11 } else { Installed::Spec10 };
                self.asked.insert(feature.plugin, (stamp, installed));
                installed
            }
        }
    }

    /// The names of the files among which the container runtime chooses.
    pub fn confs(&self) -> Vec<String> {
        let entries = fs::read_dir(self.conf.path()).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// Writes the conflist; returns whether it was another one.
    pub fn write_conflist(&self, text: &str) -> Result<bool, folder::Error> {
        self.conf.put(CONFLIST_FILE, text.as_bytes(), 0o644)
    }

    /// Writes the blocks file; returns whether it was another one.
    pub fn write_blocks(&self, text: &str) -> Result<bool, folder::Error> {
        self.run.put(BLOCKS_FILE, text.as_bytes(), 0o644)
    }
}

/// What a CNI plugin answers to VERSION.
fn versions_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut child = Command::new(path)
        .env_clear()
        .env("CNI_COMMAND", "VERSION")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + PLUGIN_TIMEOUT;
    // The answer fits into the pipe, so the plugin can end before anybody reads.
    while child.try_wait()?.is_none() {
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut answer = Vec::new();
    if let Some(output) = child.stdout.take() {
        output.take(MAX_ANSWER).read_to_end(&mut answer)?;
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    struct Node {
        root: tempfile::TempDir,
        files: Files,
    }

    fn node() -> Node {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::write(at("image-plat"), "binary one").unwrap();
        let files = Files::new(&at("net.d"), &at("bin"), &at("run"), &at("image-plat"));
        for folder in [&files.conf, &files.bin] {
            folder.ensure().unwrap();
        }
        Node { root, files }
    }

    impl Node {
        fn portmap(&mut self, script: &str) -> Installed {
            let path = self.root.path().join("bin/portmap");
            let _ = fs::remove_file(&path);
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            self.files.installed(HOST_PORTS)
        }
    }

    #[test]
    fn the_binary_is_installed_once_and_again_when_either_side_changes() {
        let mut node = node();
        let target = node.root.path().join("bin/plat");
        assert!(node.files.install_plugin().unwrap());
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o755);
        assert!(!node.files.install_plugin().unwrap());
        for damage in ["", "binary xyz"] {
            fs::write(&target, damage).unwrap();
            assert!(node.files.install_plugin().unwrap());
            assert_eq!(fs::read(&target).unwrap(), b"binary one");
        }
        fs::remove_file(&target).unwrap();
        assert!(node.files.install_plugin().unwrap());
        fs::write(node.root.path().join("image-plat"), "binary two").unwrap();
        assert!(node.files.install_plugin().unwrap());
        assert_eq!(fs::read(&target).unwrap(), b"binary two");
    }

    #[test]
    fn an_image_without_the_binary_says_which_flag_to_set() {
        let mut node = node();
        fs::remove_file(node.root.path().join("image-plat")).unwrap();
        assert!(node.files.install_plugin().unwrap_err().to_string().contains("--plugin"));
    }

    #[test]
    fn portmap_is_asked_for_its_versions_and_doubted_on_any_failure() {
        let mut node = node();
        assert_eq!(node.files.installed(HOST_PORTS), Installed::Absent);
        let answer = r#"echo '{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}'"#;
        assert_eq!(node.portmap(&format!("test \"$CNI_COMMAND\" = VERSION && {answer}")), Installed::Spec11);
        for doubt in ["exit 1", "echo no JSON", "head -c 100000 /dev/zero", r#"kill -9 $$"#] {
            assert_eq!(node.portmap(doubt), Installed::Spec10, "{doubt}");
        }
        fs::set_permissions(node.root.path().join("bin/portmap"), fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(node.files.installed(HOST_PORTS), Installed::Absent, "not executable");
    }

    #[test]
    fn a_plugin_that_hangs_is_ended() {
        let mut node = node();
        let before = Instant::now();
        assert_eq!(node.portmap("exec sleep 60"), Installed::Spec10);
        assert!(before.elapsed() < Duration::from_secs(30));
    }
}
