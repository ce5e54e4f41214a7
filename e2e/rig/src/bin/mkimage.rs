//! Writes an OCI image archive from files, without an engine.
//!
//! `mkimage --name localhost/plat-operator:0.1.0 --entrypoint /plat-operator
//!  --file target/.../plat-operator=/plat-operator target/images/plat-operator.tar`

use std::path::{Path, PathBuf};
use std::{fs, io};

use clap::Parser;
use plat_rig::archive::{Content, File, Image, archive};

/// Writes an OCI image archive.
#[derive(Parser)]
struct Args {
    /// Name with tag.
    #[arg(long)]
    name: String,
    /// Program that the image runs, with its first arguments, separated by spaces.
    #[arg(long)]
    entrypoint: String,
    /// A program to put in: FILE=/path/in/image.
    #[arg(long = "file", value_name = "FILE=PATH", value_parser = pair)]
    files: Vec<(String, String)>,
    /// A symbolic link to put in: /path/in/image=/where/it/leads.
    #[arg(long = "link", value_name = "PATH=TO", value_parser = pair)]
    links: Vec<(String, String)>,
    /// A label: KEY=VALUE.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    labels: Vec<(String, String)>,
    /// The archive.
    out: PathBuf,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (left, right) = text.split_once('=').ok_or_else(|| format!("'{text}' has no '='"))?;
    Ok((left.to_owned(), right.to_owned()))
}

fn main() -> io::Result<()> {
    let args = Args::parse();
    let mut files = Vec::new();
    for (from, path) in args.files {
        let bytes =
            fs::read(&from).map_err(|e| io::Error::new(e.kind(), format!("cannot read {from}: {e}")))?;
        files.push(File { path, content: Content::Program(bytes) });
    }
    for (path, to) in args.links {
        files.push(File { path, content: Content::Link(to) });
    }
    let entrypoint = args.entrypoint.split_whitespace().map(str::to_owned).collect();
    write(&args.out, &archive(&Image { name: args.name, entrypoint, files, labels: args.labels })?)
}

/// By rename, so that a reader never sees half an archive.
fn write(out: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = out.with_extension("tmp");
    fs::write(&temporary, bytes)?;
    fs::rename(&temporary, out)
}
