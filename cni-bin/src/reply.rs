//! What ADD answers, in the shape of every version of the specification, and how results of others
//! (`prevResult`, delegated IPAM plugins) are read. Pure.
//!
//! | version | shape |
//! |---|---|
//! | 0.1.0, 0.2.0 | `ip4` and `ip6`, one address each, with their routes |
//! | 0.3.0 to 0.4.0 | `interfaces`, `ips` with `version`, `routes` |
//! | 1.0.0 | the same without `ips[].version` |
//! | 1.1.0 | and `mtu` of interfaces, `mtu`, `advmss`, `priority`, `table`, `scope` of routes |

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use crate::config::{Dns, RouteConf, parse_route};
use crate::error::{Code, Error};
use crate::json::{Json, same_key};
use crate::spec::SpecVersion;

/// An interface of a result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address, as text.
    pub mac: String,
    /// Path of the pod's namespace; empty for the host's interfaces.
    pub sandbox: String,
    /// Its MTU in bytes.
    pub mtu: Option<u32>,
}

/// An address of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ip {
    /// The address with the length of its prefix.
    pub address: IpNet,
    /// Its gateway.
    pub gateway: Option<IpAddr>,
    /// Which of the result's interfaces has it. An index that is out of range makes containerd panic, so
    /// one that is is left out.
    pub interface: Option<usize>,
}

/// A result of ADD.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// The interfaces: bridge, host's end, pod's end, in this order, as the reference bridge plugin does;
    /// chained plugins rely on it.
    pub interfaces: Vec<Interface>,
    /// The pod's addresses.
    pub ips: Vec<Ip>,
    /// The pod's routes.
    pub routes: Vec<RouteConf>,
    /// The pod's resolvers.
    pub dns: Dns,
}

impl Reply {
    /// The result as JSON text. The two oldest versions need an address.
    pub fn render(&self, version: SpecVersion) -> Result<String, Error> {
        let mut object =
            if version < SpecVersion::V0_3_0 { self.render_old()? } else { self.render_new(version) };
        object.insert("cniVersion".to_owned(), json!(version.text()));
        if version < SpecVersion::V1_0_0 || !self.dns.is_empty() {
            object.insert("dns".to_owned(), render_dns(&self.dns));
        }
        Ok(Value::Object(object).to_string())
    }

    fn render_old(&self) -> Result<Map<String, Value>, Error> {
        let mut object = Map::new();
        for (key, is_v4) in [("ip4", true), ("ip6", false)] {
            if let Some(ip) = self.ips.iter().find(|ip| ip.address.addr().is_ipv4() == is_v4) {
                let routes: Vec<Value> = self
                    .routes
                    .iter()
                    .filter(|r| r.dst.addr().is_ipv4() == is_v4)
                    .map(|r| render_route(r, SpecVersion::V0_2_0))
                    .collect();
                let mut entry = json!({"ip": ip.address.to_string()});
                set(&mut entry, "gateway", ip.gateway.map(|g| g.to_string()));
                set(&mut entry, "routes", Some(routes).filter(|r| !r.is_empty()));
                object.insert(key.to_owned(), entry);
            }
        }
        if object.is_empty() {
            let details = "set ipam, or a cniVersion from 0.3.0";
            return Err(Error::because(Code::Config, "a result of this version needs an address", details));
        }
        Ok(object)
    }

    fn render_new(&self, version: SpecVersion) -> Map<String, Value> {
        let mut object = Map::new();
        let interfaces: Vec<Value> = self.interfaces.iter().map(|i| render_interface(i, version)).collect();
        let ips: Vec<Value> = self.ips.iter().map(|ip| self.render_ip(ip, version)).collect();
        let routes: Vec<Value> = self.routes.iter().map(|r| render_route(r, version)).collect();
        for (key, list) in [("interfaces", interfaces), ("ips", ips), ("routes", routes)] {
            if !list.is_empty() {
                object.insert(key.to_owned(), Value::Array(list));
            }
        }
        object
    }

    fn render_ip(&self, ip: &Ip, version: SpecVersion) -> Value {
        let mut entry = json!({"address": ip.address.to_string()});
        if version < SpecVersion::V1_0_0 {
            set(&mut entry, "version", Some(if ip.address.addr().is_ipv4() { "4" } else { "6" }));
        }
        set(&mut entry, "gateway", ip.gateway.map(|g| g.to_string()));
        set(&mut entry, "interface", ip.interface.filter(|i| *i < self.interfaces.len()));
        entry
    }

    /// Reads a result. Its own version decides about its shape; absent, `assumed` does. An interface index
    /// that is out of range counts as absent.
    pub fn parse(json: &Json, assumed: SpecVersion) -> Result<Reply, Error> {
        let version = match json.get("cniVersion").text("cniVersion")? {
            "" => assumed,
            text => SpecVersion::parse(text)?,
        };
        let mut reply = Reply { dns: Dns::parse(json.get("dns"), "dns")?, ..Reply::default() };
        if version < SpecVersion::V0_3_0 {
            for key in ["ip4", "ip6"] {
                reply.parse_old(json.get(key).object(key)?, key)?;
            }
            return Ok(reply);
        }
        for interface in json.get("interfaces").list("interfaces")? {
            reply.interfaces.push(parse_interface(interface)?);
        }
        for ip in json.get("ips").list("ips")? {
            let interface = ip.get("interface").i64("ips.interface")?.and_then(|i| usize::try_from(i).ok());
            reply.ips.push(Ip {
                address: parse_cidr(ip.get("address").text("ips.address")?)?,
                gateway: parse_gateway(ip.get("gateway").text("ips.gateway")?)?,
                interface: interface.filter(|i| *i < reply.interfaces.len()),
            });
        }
        for route in json.get("routes").list("routes")? {
            reply.routes.push(parse_route(route, "routes")?);
        }
        Ok(reply)
    }

    fn parse_old(&mut self, json: &Json, key: &str) -> Result<(), Error> {
        if json.is_null() {
            return Ok(());
        }
        let address = parse_cidr(json.get("ip").text(&format!("{key}.ip"))?)?;
        let gateway = parse_gateway(json.get("gateway").text(&format!("{key}.gateway"))?)?;
        self.ips.push(Ip { address, gateway, interface: None });
        for route in json.get("routes").list(&format!("{key}.routes"))? {
            self.routes.push(parse_route(route, &format!("{key}.routes"))?);
        }
        Ok(())
    }
}

/// Another plugin's result as it came, keys that we do not know included, but without interface indexes that
/// are out of range: containerd would panic over one. Pure.
pub fn without_stray_indexes(mut result: Json) -> Json {
    let count = result.get("interfaces").list("interfaces").map_or(0, <[Json]>::len);
    let in_range = |index: &Json| {
        let number = index.i64("interface").ok().flatten().and_then(|i| usize::try_from(i).ok());
        index.is_null() || number.is_some_and(|i| i < count)
    };
    let Json::Object(fields) = &mut result else { return result };
    for (_, ips) in fields.iter_mut().filter(|(key, _)| same_key(key, "ips")) {
        let Json::List(ips) = ips else { continue };
        for ip in ips {
            if let Json::Object(fields) = ip {
                fields.retain(|(key, value)| !same_key(key, "interface") || in_range(value));
            }
        }
    }
    result
}

fn set<T: Into<Value>>(object: &mut Value, key: &str, value: Option<T>) {
    if let (Some(fields), Some(value)) = (object.as_object_mut(), value) {
        fields.insert(key.to_owned(), value.into());
    }
}

fn render_interface(interface: &Interface, version: SpecVersion) -> Value {
    let mut entry = json!({"name": interface.name});
    let given = |text: &String| Some(text.clone()).filter(|t| !t.is_empty());
    set(&mut entry, "mac", given(&interface.mac));
    set(&mut entry, "sandbox", given(&interface.sandbox));
    if version >= SpecVersion::V1_1_0 {
        set(&mut entry, "mtu", interface.mtu);
    }
    entry
}

fn render_route(route: &RouteConf, version: SpecVersion) -> Value {
    let mut entry = json!({"dst": route.dst.to_string()});
    set(&mut entry, "gw", route.gw.map(|g| g.to_string()));
    if version >= SpecVersion::V1_1_0 {
        set(&mut entry, "mtu", route.mtu);
        set(&mut entry, "advmss", route.advmss);
        set(&mut entry, "priority", route.priority);
        set(&mut entry, "table", route.table);
        set(&mut entry, "scope", route.scope);
    }
    entry
}

fn render_dns(dns: &Dns) -> Value {
    let mut entry = json!({});
    let given = |list: &Vec<String>| Some(list.clone()).filter(|l| !l.is_empty());
    set(&mut entry, "nameservers", given(&dns.nameservers));
    set(&mut entry, "domain", Some(dns.domain.clone()).filter(|d| !d.is_empty()));
    set(&mut entry, "search", given(&dns.search));
    set(&mut entry, "options", given(&dns.options));
    entry
}

fn parse_interface(json: &Json) -> Result<Interface, Error> {
    Ok(Interface {
        name: json.get("name").text("interfaces.name")?.to_owned(),
        mac: json.get("mac").text("interfaces.mac")?.to_owned(),
        sandbox: json.get("sandbox").text("interfaces.sandbox")?.to_owned(),
        mtu: json.get("mtu").u32("interfaces.mtu")?.filter(|mtu| *mtu != 0),
    })
}

fn parse_cidr(text: &str) -> Result<IpNet, Error> {
    text.parse()
        .map_err(|_| Error::new(Code::Decode, format!("invalid result: address {text:?} is not a CIDR")))
}

fn parse_gateway(text: &str) -> Result<Option<IpAddr>, Error> {
    if text.is_empty() {
        return Ok(None);
    }
    let invalid = || Error::new(Code::Decode, format!("invalid result: gateway {text:?} is not an address"));
    text.parse().map(Some).map_err(|_| invalid())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reply() -> Reply {
        Reply {
            interfaces: vec![
                Interface { name: "cni0".into(), mac: "0a:72:0a:09:00:01".into(), ..Interface::default() },
                Interface {
                    name: "plat1".into(),
                    mac: "0a:71:0a:09:00:07".into(),
                    mtu: Some(1400),
                    ..Interface::default()
                },
                Interface {
                    name: "eth0".into(),
                    mac: "0a:70:0a:09:00:07".into(),
                    sandbox: "/run/netns/x".into(),
                    mtu: Some(1400),
                },
            ],
            ips: vec![
                Ip {
                    address: "10.9.0.7/24".parse().unwrap(),
                    gateway: Some("10.9.0.1".parse().unwrap()),
                    interface: Some(2),
                },
                Ip { address: "fd00::7/64".parse().unwrap(), gateway: None, interface: Some(2) },
            ],
            routes: vec![
                RouteConf {
                    mtu: Some(1300),
                    ..RouteConf::new("0.0.0.0/0".parse().unwrap(), Some("10.9.0.1".parse().unwrap()))
                },
                RouteConf::new("::/0".parse().unwrap(), None),
            ],
            dns: Dns::default(),
        }
    }

    #[test]
    fn each_version_has_its_shape() {
        assert_eq!(
            reply().render(SpecVersion::V0_2_0).unwrap(),
            r#"{"cniVersion":"0.2.0","dns":{},"ip4":{"gateway":"10.9.0.1","ip":"10.9.0.7/24","routes":[{"dst":"0.0.0.0/0","gw":"10.9.0.1"}]},"ip6":{"ip":"fd00::7/64","routes":[{"dst":"::/0"}]}}"#
        );
        assert_eq!(
            reply().render(SpecVersion::V0_4_0).unwrap(),
            r#"{"cniVersion":"0.4.0","dns":{},"interfaces":[{"mac":"0a:72:0a:09:00:01","name":"cni0"},{"mac":"0a:71:0a:09:00:07","name":"plat1"},{"mac":"0a:70:0a:09:00:07","name":"eth0","sandbox":"/run/netns/x"}],"ips":[{"address":"10.9.0.7/24","gateway":"10.9.0.1","interface":2,"version":"4"},{"address":"fd00::7/64","interface":2,"version":"6"}],"routes":[{"dst":"0.0.0.0/0","gw":"10.9.0.1"},{"dst":"::/0"}]}"#
        );
        let new = reply().render(SpecVersion::V1_0_0).unwrap();
        assert!(!new.contains("version\":\"4") && !new.contains("mtu") && !new.contains("dns"), "{new}");
        let newest = reply().render(SpecVersion::V1_1_0).unwrap();
        assert!(newest.contains(r#""mtu":1400"#) && newest.contains(r#""mtu":1300"#), "{newest}");
    }

    #[test]
    fn the_oldest_versions_need_an_address() {
        let empty = Reply::default();
        assert_eq!(empty.render(SpecVersion::V0_1_0).unwrap_err().code, 7);
        assert!(empty.render(SpecVersion::V0_3_0).is_ok());
    }

    #[test]
    fn an_interface_index_out_of_range_is_never_written_nor_believed() {
        let mut bad = reply();
        bad.ips[0].interface = Some(3);
        let text = bad.render(SpecVersion::V1_0_0).unwrap();
        assert_eq!(text.matches("\"interface\":").count(), 1, "{text}");
        for index in ["-1", "3", "99"] {
            let json = format!(
                r#"{{"cniVersion":"1.0.0","interfaces":[{{"name":"a"}}],"ips":[{{"address":"10.0.0.1/8","interface":{index}}}]}}"#
            );
            let read = Reply::parse(&Json::parse(json.as_bytes()).unwrap(), SpecVersion::V1_0_0).unwrap();
            assert_eq!(read.ips[0].interface, None, "{index}");
        }
    }

    #[test]
    fn results_come_back_in_what_their_version_can_say() {
        for version in SpecVersion::ALL {
            let text = reply().render(version).unwrap();
            let read = Reply::parse(&Json::parse(text.as_bytes()).unwrap(), SpecVersion::NEWEST).unwrap();
            assert_eq!(read.render(version).unwrap(), text, "{version}");
        }
    }

    #[test]
    fn a_result_without_version_has_the_shape_of_the_configuration() {
        let json = Json::parse(br#"{"ip4":{"ip":"10.9.0.7/24"}}"#).unwrap();
        assert_eq!(Reply::parse(&json, SpecVersion::V0_2_0).unwrap().ips.len(), 1);
        assert_eq!(Reply::parse(&json, SpecVersion::V1_0_0).unwrap().ips.len(), 0);
    }

    proptest! {
        #[test]
        fn no_result_causes_a_panic(text in "\\{(\"(ips|ip4|interfaces|routes|dns|cniVersion)\":(\\[|\\{|\"|1|null|\\}|\\]|,){0,12}){0,3}\\}") {
            if let Ok(json) = Json::parse(text.as_bytes()) {
                let _ = Reply::parse(&json, SpecVersion::NEWEST);
            }
        }
    }
}
