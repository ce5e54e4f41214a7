//! `runtimeConfig.portMappings`: which ports of the node shall lead to the pod.
//!
//! The runtime sends them to plugins that declare the capability `portMappings`; that is how a
//! configuration says that this plugin opens host ports, and not a chained one.

use std::collections::BTreeMap;

use plat_crds::host_port::{HostIp, HostPort, Transport};
use std::net::{IpAddr, Ipv6Addr};

use crate::error::{Code, Error};
use crate::json::Json;

const KEY: &str = "runtimeConfig.portMappings";

/// Reads the list; sorted and without repetitions.
pub fn parse(runtime: &Json) -> Result<Vec<HostPort>, Error> {
    let list = runtime.get("portMappings").list(KEY)?;
    let mut ports = list.iter().map(parse_port).collect::<Result<Vec<_>, _>>()?;
    ports.sort_unstable();
    ports.dedup();
    let mut seen = BTreeMap::new();
    for port in &ports {
        let place = (port.host_ip, port.protocol, port.host_port);
        if let Some(other) = seen.insert(place, port.container_port) {
            let why = format!("it cannot lead to both {other} and {} in the pod", port.container_port);
            return Err(Error::because(Code::Config, format!("invalid {KEY}: {port} stands twice"), why));
        }
    }
    Ok(ports)
}

fn parse_port(json: &Json) -> Result<HostPort, Error> {
    let json = json.object(KEY)?;
    let number = |name: &str| {
        let key = format!("{KEY}.{name}");
        let number = json.get(name).i64(&key)?.unwrap_or(0);
        let invalid =
            || Error::because(Code::Config, format!("invalid {key} {number}"), "it must be 1 to 65535");
        u16::try_from(number).ok().filter(|n| *n != 0).ok_or_else(invalid)
    };
    Ok(HostPort {
        host_ip: host_ip(json.get("hostIP").text(&format!("{KEY}.hostIP"))?)?,
        protocol: protocol(json.get("protocol").text(&format!("{KEY}.protocol"))?)?,
        host_port: number("hostPort")?,
        container_port: number("containerPort")?,
    })
}

fn host_ip(text: &str) -> Result<HostIp, Error> {
    let host_ip = HostIp::parse(text).ok_or_else(|| {
        Error::new(Code::Config, format!("invalid {KEY}.hostIP: {text:?} is not an address"))
    })?;
    if host_ip == HostIp::Only(IpAddr::from(Ipv6Addr::LOCALHOST)) {
        let msg = format!("unsupported key {KEY}.hostIP with value {text:?}");
        return Err(Error::because(
            Code::UnsupportedKey,
            msg,
            "the kernel leads ::1 to no pod; use 127.0.0.1",
        ));
    }
    Ok(host_ip)
}

/// TCP if nothing is said, as in Kubernetes.
fn protocol(text: &str) -> Result<Transport, Error> {
    if text.is_empty() {
        return Ok(Transport::Tcp);
    }
    let named = Transport::ALL.into_iter().find(|transport| text.eq_ignore_ascii_case(transport.name()));
    named.ok_or_else(|| {
        let msg = format!("invalid {KEY}.protocol {text:?}");
        Error::because(Code::Config, msg, "it must be tcp, udp or sctp")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(list: &str) -> Result<Vec<HostPort>, Error> {
        parse(&Json::parse(format!(r#"{{"portMappings":{list}}}"#).as_bytes()).unwrap())
    }

    fn port(host_ip: &str, protocol: Transport, host_port: u16, container_port: u16) -> HostPort {
        HostPort { host_ip: HostIp::parse(host_ip).unwrap(), protocol, host_port, container_port }
    }

    #[test]
    fn both_spellings_are_read() {
        let expected = vec![port("", Transport::Tcp, 8080, 80), port("192.0.2.7", Transport::Udp, 53, 5353)];
        let documented = r#"[{"hostPort":53,"containerPort":5353,"protocol":"udp","hostIP":"192.0.2.7"},
            {"hostPort":8080,"containerPort":80,"protocol":"tcp"}]"#;
        let containerd = r#"[{"HostPort":53,"ContainerPort":5353,"Protocol":"udp","HostIP":"192.0.2.7"},
            {"HostPort":8080,"ContainerPort":80,"Protocol":"tcp","HostIP":""}]"#;
        assert_eq!(read(documented), Ok(expected.clone()));
        assert_eq!(read(containerd), Ok(expected));
        assert_eq!(read("null"), Ok(vec![]));
        let defaults = r#"[{"hostPort":8080.0,"containerPort":80,"protocol":null}]"#;
        assert_eq!(read(defaults), Ok(vec![port("", Transport::Tcp, 8080, 80)]));
        let upper = r#"[{"hostPort":1,"containerPort":65535,"protocol":"SCTP"}]"#;
        assert_eq!(read(upper), Ok(vec![port("", Transport::Sctp, 1, 65535)]));
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_name() {
        for (list, code, words) in [
            (r#"[{"containerPort":80}]"#, 7, "invalid runtimeConfig.portMappings.hostPort 0"),
            (r#"[{"hostPort":80}]"#, 7, "invalid runtimeConfig.portMappings.containerPort 0"),
            (r#"[{"hostPort":-1,"containerPort":80}]"#, 7, "hostPort -1"),
            (r#"[{"hostPort":65536,"containerPort":80}]"#, 7, "hostPort 65536"),
            (r#"[{"hostPort":"80","containerPort":80}]"#, 6, "portMappings.hostPort must be a whole number"),
            (r#"[{"hostPort":80,"containerPort":80,"protocol":"icmp"}]"#, 7, "protocol \"icmp\""),
            (r#"[{"hostPort":80,"containerPort":80,"hostIP":"eth0"}]"#, 7, "\"eth0\" is not an address"),
            (r#"[{"hostPort":80,"containerPort":80,"hostIP":"::1"}]"#, 2, "hostIP with value \"::1\""),
            (
                r#"[{"hostPort":80,"containerPort":80},{"hostPort":80,"containerPort":81}]"#,
                7,
                "tcp port 80 stands twice",
            ),
            ("{}", 6, "must be a list"),
            ("[80]", 6, "must be an object"),
        ] {
            let error = read(list).unwrap_err();
            assert!(error.code == code && error.to_string().contains(words), "{list}: {error}");
        }
    }

    #[test]
    fn what_is_said_twice_counts_once() {
        let twice = r#"[{"hostPort":80,"containerPort":80},{"hostPort":80,"containerPort":80,"protocol":"tcp"},
            {"hostPort":80,"containerPort":80,"hostIP":"0.0.0.0"}]"#;
        let expected = vec![port("", Transport::Tcp, 80, 80), port("0.0.0.0", Transport::Tcp, 80, 80)];
        assert_eq!(read(twice), Ok(expected));
    }
}
