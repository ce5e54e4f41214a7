//! `plat`, the CNI binary: environment and standard input in, one JSON object on standard output out.
//!
//! Without `CNI_COMMAND` it is a command for people: `plat leases`.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use plat_cni::call::Call;
use plat_cni::config::{MAX_INPUT, Network};
use plat_cni::error::{Code, Error};
use plat_cni::request::{self, Verb};
use plat_cni::spec::SpecVersion;
use plat_cni::{add, check, del, delegate, fail, gc, leases, status, version};
use rustix::fs::OFlags;

fn main() -> ExitCode {
    report_panics();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let command = variable("CNI_COMMAND").unwrap_or_default();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [delegate::BECOME_PLUGIN, parent, file] => {
            eprintln!("plat: {}: {}", file, delegate::become_plugin(parent, Path::new(file)));
            ExitCode::FAILURE
        }
        ["leases", rest @ ..] => {
            print_or_complain(leases::run(&rest.iter().map(|&a| a.to_owned()).collect::<Vec<_>>()))
        }
        _ if command.is_empty() => {
            eprintln!(
                "plat {}: CNI plugin of the Plat pod network\nCNI protocol versions supported: {}\n{}",
                env!("CARGO_PKG_VERSION"),
                SpecVersion::list(),
                leases::USAGE
            );
            ExitCode::SUCCESS
        }
        _ => answer(&command),
    }
}

/// A panic is a fault of ours; the runtime must still get its JSON, on the only line there will be.
fn report_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let error = Error::because(Code::Internal, "internal error, please report it", panic);
        let _ = write_out(&error.to_json(SpecVersion::NEWEST.text()));
        std::process::exit(1);
    }));
}

fn print_or_complain(result: Result<String, Error>) -> ExitCode {
    match result.map(|text| write_out(&text)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(_)) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("plat: {error}");
            ExitCode::FAILURE
        }
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Serves one call by a runtime.
fn answer(command: &str) -> ExitCode {
    let mut speaks = SpecVersion::NEWEST;
    match serve(command, &mut speaks) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With nobody left to read it there is nothing more to do.
            let _ = write_out(&error.to_json(speaks.text()));
            ExitCode::FAILURE
        }
    }
}

fn serve(command: &str, speaks: &mut SpecVersion) -> Result<(), Error> {
    let verb = Verb::parse(command)?;
    let container = request::read_container(verb, &variable)?;
    if verb == Verb::Version {
        return say(&version::version(&read_in().unwrap_or_default()));
    }
    let input = read_in()
        .map_err(|e| Error::because(Code::Io, "cannot read the configuration on standard input", e.kind()))?;
    let network = Network::parse(&input)?;
    *speaks = network.version;
    let mut call = Call::new(container, network, input, variable("CNI_PATH").unwrap_or_default())?;
    match verb {
        Verb::Add => serve_add(&mut call),
        Verb::Del => del::del(&mut call),
        Verb::Check => check::check(&mut call),
        Verb::Status => status::status(&call),
        Verb::Gc => gc::gc(&mut call),
        Verb::Version => Ok(()),
    }
}

/// An ADD counts once the runtime has its result. Until then everything is taken back on failure.
fn serve_add(call: &mut Call) -> Result<(), Error> {
    let mut done = add::Done::default();
    let result = add::add(call, &mut done).and_then(|result| {
        fail::point("reply")?;
        say(&result)
    });
    result.map_err(|error| {
        let left = add::undo(call, done);
        if left.is_empty() {
            return error;
        }
        Error { details: format!("{}; could not be undone: {}", error.details, left.join("; ")), ..error }
    })
}

fn say(text: &str) -> Result<(), Error> {
    write_out(text)
        .map_err(|e| Error::because(Code::Io, "cannot write the result to standard output", e.kind()))
}

/// The one place that writes to standard output.
fn write_out(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.write_all(b"\n")?;
    out.flush()
}

/// Whether standard input was closed when we were started. Before `main`, Rust opens `/dev/null` in the place of
/// a closed one, for reading and writing: a caller that means an empty input opens it for reading.
fn was_closed(stdin: &std::fs::File) -> io::Result<bool> {
    let null = rustix::fs::makedev(1, 3);
    let is_null = std::os::unix::fs::MetadataExt::rdev(&stdin.metadata()?) == null;
    Ok(is_null && rustix::fs::fcntl_getfl(stdin)?.contains(OFlags::RDWR))
}

/// Reads standard input to its end, or to one byte more than we would take.
fn read_in() -> io::Result<Vec<u8>> {
    // Not io::stdin(), which takes a descriptor that cannot be read for an empty one.
    let stdin = std::fs::File::from(io::stdin().as_fd().try_clone_to_owned()?);
    if was_closed(&stdin)? {
        return Err(io::ErrorKind::NotConnected.into());
    }
    let mut input = Vec::with_capacity(4096);
    stdin.take(MAX_INPUT as u64 + 1).read_to_end(&mut input)?;
    Ok(input)
}
