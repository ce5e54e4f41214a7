//! An OCI image archive: one layer, one config, one manifest, in a tar (OCI image spec 1.1, image layout).
//! `ctr images import` and `docker load` read it. The same files give the same bytes.

use std::io;

use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// What an image holds and how it starts.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// Name with tag, such as `localhost/plat-agent:0.1.0`.
    pub name: String,
    /// Program to run, with its first arguments.
    pub entrypoint: Vec<String>,
    /// Files of its only layer. Parent folders are added.
    pub files: Vec<File>,
    /// OCI annotations of the config (`labels`), such as the source and licence.
    pub labels: Vec<(String, String)>,
}

/// One file of an image.
#[derive(Clone, Debug)]
pub struct File {
    /// Absolute path in the image.
    pub path: String,
    /// What it is.
    pub content: Content,
}

/// What a file of an image is.
#[derive(Clone, Debug)]
pub enum Content {
    /// A program: mode 0755.
    Program(Vec<u8>),
    /// A symbolic link to that path.
    Link(String),
}

/// The machine that programs of this build run on, in OCI's words (GOARCH).
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The archive of `image`.
pub fn archive(image: &Image) -> io::Result<Vec<u8>> {
    let layer = layer(&image.files)?;
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Entrypoint": image.entrypoint,
            "Env": ["PATH=/bin"],
            "WorkingDir": "/",
            "Labels": image.labels.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
        },
        "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
    })
    .to_string()
    .into_bytes();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    })
    .to_string()
    .into_bytes();
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["platform"] = json!({"architecture": architecture(), "os": "linux"});
    let tag = image.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
    entry["annotations"] =
        json!({"io.containerd.image.name": image.name, "org.opencontainers.image.ref.name": tag});
    let index = json!({"schemaVersion": 2, "manifests": [entry]}).to_string().into_bytes();

    let mut tar = Builder::new(Vec::new());
    append(&mut tar, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append(&mut tar, "index.json", 0o644, &index)?;
    for blob in [&config, &layer, &manifest] {
        append(&mut tar, &format!("blobs/{}", digest(blob).replace(':', "/")), 0o644, blob)?;
    }
    tar.into_inner()
}

fn layer(files: &[File]) -> io::Result<Vec<u8>> {
    let mut tar = Builder::new(Vec::new());
    let mut folders = std::collections::BTreeSet::new();
    for file in files {
        let path = file.path.trim_start_matches('/');
        for (at, _) in path.match_indices('/') {
            folders.insert(path[..at].to_owned());
        }
    }
    for folder in folders {
        tar.append_data(&mut header(EntryType::Directory, 0o755, 0), format!("{folder}/"), io::empty())?;
    }
    for file in files {
        let path = file.path.trim_start_matches('/');
        match &file.content {
            Content::Program(bytes) => append(&mut tar, path, 0o755, bytes)?,
            Content::Link(to) => tar.append_link(&mut header(EntryType::Symlink, 0o777, 0), path, to)?,
        }
    }
    tar.into_inner()
}

fn append(tar: &mut Builder<Vec<u8>>, path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
    tar.append_data(&mut header(EntryType::Regular, mode, data.len() as u64), path, data)
}

/// Owner root, time 0: nothing of the machine that made the image.
fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header
}

fn digest(blob: &[u8]) -> String {
    let hex: String = Sha256::digest(blob).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn descriptor(media_type: &str, blob: &[u8]) -> serde_json::Value {
    json!({"mediaType": media_type, "digest": digest(blob), "size": blob.len()})
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read;

    use super::*;

    fn unpack(tar: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(tar).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut data = Vec::new();
            entry.read_to_end(&mut data).unwrap();
            files.insert(path, data);
        }
        files
    }

    fn image() -> Image {
        Image {
            name: "localhost/x:1".into(),
            entrypoint: vec!["/bin/x".into()],
            files: vec![
                File { path: "/bin/x".into(), content: Content::Program(b"#!".to_vec()) },
                File { path: "/bin/y".into(), content: Content::Link("/bin/x".into()) },
            ],
            labels: vec![],
        }
    }

    #[test]
    fn every_descriptor_leads_to_a_blob_of_that_size_and_digest() {
        let files = unpack(&archive(&image()).unwrap());
        let blob = |descriptor: &serde_json::Value| {
            let name = descriptor["digest"].as_str().unwrap();
            let bytes = &files[&format!("blobs/{}", name.replace(':', "/"))];
            assert_eq!(digest(bytes), name);
            assert_eq!(descriptor["size"], bytes.len());
            bytes
        };
        let index: serde_json::Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(blob(&index["manifests"][0])).unwrap();
        let config: serde_json::Value = serde_json::from_slice(blob(&manifest["config"])).unwrap();
        let layer = blob(&manifest["layers"][0]);
        assert_eq!(config["rootfs"]["diff_ids"][0], digest(layer));
        assert_eq!(config["config"]["Entrypoint"][0], "/bin/x");
        assert_eq!(unpack(layer).keys().collect::<Vec<_>>(), ["bin/", "bin/x", "bin/y"]);
    }

    #[test]
    fn the_same_files_give_the_same_bytes() {
        assert_eq!(archive(&image()).unwrap(), archive(&image()).unwrap());
    }
}
