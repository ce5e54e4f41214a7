//! Prints docs/reference.md, the reference of the four kinds, from the CRDs: `cargo run --bin crdref` (see
//! `make generate`).

use std::fmt::Write;

use kube::CustomResourceExt;
use plat_crds::{ClusterCIDR, NodeNetwork, PodCIDR, RoutingPolicy};
use serde_json::Value;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    print!("{HEAD}");
    for crd in [ClusterCIDR::crd(), PodCIDR::crd(), RoutingPolicy::crd(), NodeNetwork::crd()] {
        print!("{}", kind(&serde_json::to_value(crd)?)?);
    }
    Ok(())
}

const HEAD: &str = "\
# Reference of the objects

Made from the CRDs by `make generate`; do not edit. `kubectl explain podcidr.spec` prints the same text.

All kinds are of group `plat.network`, version `v1alpha1`, and have no namespace. `kubectl get plat` lists them all.
\"Bounds\" and \"Rules\" are checked by the API server when an object is written. Conditions are those of Kubernetes: `type`,
`status` (`True`, `False`, `Unknown`), `reason`, `message`, `observedGeneration`, `lastTransitionTime`; docs/operations.md
lists what they say.
";

/// The section of one kind.
fn kind(crd: &Value) -> Result<String, std::fmt::Error> {
    let spec = &crd["spec"];
    let version = &spec["versions"][0];
    let root = &version["schema"]["openAPIV3Schema"];
    let mut out = String::new();
    write!(out, "\n## {}\n\n{}\n", text(&spec["names"]["kind"]), prose(root))?;
    let short =
        list(&spec["names"]["shortNames"]).map(|name| format!(", `{}`", text(name))).collect::<String>();
    writeln!(out, "\nNames for `kubectl`: `{}`{short}.", text(&spec["names"]["plural"]))?;
    columns(&mut out, version)?;
    for part in ["spec", "status"] {
        let mut fields = Vec::new();
        collect(&mut fields, part, &root["properties"][part], false);
        // The first row is the part itself, which says nothing that its kind does not.
        let fields: Vec<_> = fields.into_iter().skip(1).collect();
        if fields.is_empty() {
            continue;
        }
        writeln!(out, "\n### {} `{part}`\n", text(&spec["names"]["kind"]))?;
        writeln!(out, "| field | type | default | bounds | meaning |\n|---|---|---|---|---|")?;
        for field in &fields {
            writeln!(out, "{field}")?;
        }
    }
    let mut rules = Vec::new();
    collect_rules(&mut rules, "", root);
    if !rules.is_empty() {
        writeln!(out, "\nRules:\n\n{}", rules.join("\n"))?;
    }
    Ok(out)
}

fn columns(out: &mut String, version: &Value) -> std::fmt::Result {
    writeln!(out, "\n| column | shown | meaning |\n|---|---|---|")?;
    for column in list(&version["additionalPrinterColumns"]) {
        let shown = if column["priority"].as_i64().unwrap_or(0) > 0 { "`-o wide`" } else { "always" };
        let meaning = match text(&column["description"]) {
            "" if column["type"] == "date" => "Time since it was created",
            meaning => meaning,
        };
        writeln!(out, "| {} | {shown} | {meaning} |", text(&column["name"]).to_uppercase())?;
    }
    Ok(())
}

/// Adds the row of `schema` at `path` and those of everything below it.
fn collect(rows: &mut Vec<String>, path: &str, schema: &Value, required: bool) {
    let default = match &schema["default"] {
        Value::Null if required => "required".to_owned(),
        Value::Null => String::new(),
        value => format!("`{}`", value.as_str().map_or_else(|| value.to_string(), str::to_owned)),
    };
    rows.push(format!(
        "| `{path}` | {} | {default} | {} | {} |",
        type_of(schema),
        bounds(schema),
        prose(schema)
    ));
    if path == "status.conditions" {
        return;
    }
    let (inner, path) = match &schema["items"] {
        Value::Null => (schema, path.to_owned()),
        items => (items, format!("{path}[]")),
    };
    for (name, property) in inner["properties"].as_object().into_iter().flatten() {
        let required = list(&inner["required"]).any(|r| r == name);
        collect(rows, &format!("{path}.{name}"), property, required);
    }
}

/// Adds the messages of the CEL rules of `schema` and of everything below it.
fn collect_rules(rules: &mut Vec<String>, path: &str, schema: &Value) {
    let at = if path.is_empty() { "the object".to_owned() } else { format!("`{path}`") };
    for rule in list(&schema["x-kubernetes-validations"]) {
        let message = Some(text(&rule["message"])).filter(|message| !message.is_empty());
        rules.push(format!("- {at}: {}", message.unwrap_or_else(|| text(&rule["rule"]))));
    }
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        collect_rules(rules, &path, property);
    }
    if schema["items"].is_object() {
        collect_rules(rules, &format!("{path}[]"), &schema["items"]);
    }
}

fn type_of(schema: &Value) -> String {
    match (text(&schema["type"]), text(&schema["format"])) {
        ("array", _) => format!("list of {}", type_of(&schema["items"])),
        ("object", _) if schema["additionalProperties"].is_object() => {
            format!("map to {}", type_of(&schema["additionalProperties"]))
        }
        ("string", "date-time") => "time".to_owned(),
        (name, _) => name.to_owned(),
    }
}

fn bounds(schema: &Value) -> String {
    let mut parts = Vec::new();
    let values: Vec<_> = list(&schema["enum"]).filter_map(Value::as_str).map(|v| format!("`{v}`")).collect();
    if !values.is_empty() {
        parts.push(values.join(", "));
    }
    match (number(&schema["minimum"]), number(&schema["maximum"])) {
        (Some(low), Some(high)) => parts.push(format!("{low} to {high}")),
        (Some(low), None) => parts.push(format!("{low} or more")),
        (None, Some(high)) => parts.push(format!("{high} or less")),
        (None, None) => {}
    }
    for (key, unit) in [("maxLength", "characters"), ("maxItems", "entries"), ("maxProperties", "entries")] {
        if let Some(most) = number(&schema[key]) {
            parts.push(format!("at most {most} {unit}"));
        }
    }
    parts.join("; ")
}

/// Bounds of a schema are floating-point numbers; those of ours are whole.
fn number(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_f64().map(|n| n as i64))
}

/// A description as one line of a table.
fn prose(schema: &Value) -> String {
    text(&schema["description"]).split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}
