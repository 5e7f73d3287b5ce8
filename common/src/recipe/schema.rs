//! JSON Schema of the recipe, made from the checker's own table.

use serde_json::{Map, Value, json};

use super::check::LCM_TARGETS;
use super::raw::{self, Origin};
use super::table::{Fallback, Field, Kind, RECIPE, Section};

/// The schema, for editors: what single values may be. What keys mean to each other only `check` knows.
pub fn json_schema() -> Value {
    let mut schema = object(&RECIPE);
    let fields = schema.as_object_mut().expect("a schema is an object");
    fields.shift_insert(
        0,
        "$schema".into(),
        json!("https://json-schema.org/draft/2020-12/schema"),
    );
    fields.shift_insert(1, "title".into(), json!("Distillery recipe"));
    schema
}

fn object(section: &'static Section) -> Value {
    let mut properties = Map::new();
    for field in section.fields {
        if !matches!(field.kind, Kind::NotBuilt) {
            properties.insert(field.key.into(), property(field));
        }
    }
    let required: Vec<&str> = section
        .fields
        .iter()
        .filter(|f| matches!(f.default, Fallback::Required))
        .map(|f| f.key)
        .collect();
    let mut schema =
        json!({ "type": "object", "additionalProperties": false, "properties": properties });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

fn property(field: &'static Field) -> Value {
    let mut schema = kind(&field.kind);
    let mut about = field.about.to_owned();
    if let Some((key, word)) = field.only {
        about.push_str(&format!(" (with {key}: {word})"));
    }
    schema["description"] = json!(about);
    if let Fallback::Yaml(text) = field.default {
        schema["default"] = to_json(text);
    }
    schema
}

fn kind(kind_: &'static Kind) -> Value {
    match kind_ {
        Kind::Bool => json!({ "type": "boolean" }),
        Kind::Whole(min, max) => json!({ "type": "integer", "minimum": min, "maximum": max }),
        Kind::Real { min, max, closed } => {
            let bound = if *closed {
                "minimum"
            } else {
                "exclusiveMinimum"
            };
            json!({ "type": "number", bound: min, "maximum": max })
        }
        Kind::Word(words) => {
            let built = words.iter().filter(|w| w.built);
            json!({ "enum": built.map(|w| to_json(w.name)).collect::<Vec<_>>() })
        }
        Kind::Name => json!({ "type": "string", "pattern": "^[A-Za-z0-9._=-]{1,64}$" }),
        Kind::Text | Kind::Path | Kind::Uri | Kind::Secret => {
            json!({ "type": "string", "minLength": 1 })
        }
        Kind::Or(word, inner) => json!({ "anyOf": [{ "const": word }, kind(inner)] }),
        Kind::Switch(section) => json!({ "anyOf": [{ "type": "boolean" }, object(section)] }),
        Kind::Section(section) => object(section),
        Kind::List(of) => json!({ "type": "array", "minItems": 1, "items": kind(of) }),
        Kind::Pair(of) => {
            json!({ "type": "array", "minItems": 2, "maxItems": 2, "items": kind(of) })
        }
        Kind::DnsName => json!({ "type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$" }),
        Kind::Map(_) => {
            json!({ "type": "object", "additionalProperties": { "type": ["string", "number", "boolean"] } })
        }
        Kind::ShareOrPath => json!({ "anyOf": [
            { "type": "number", "minimum": 0, "maximum": 0.9 },
            { "type": "string", "minLength": 1 },
        ]}),
        Kind::Targets => json!({ "anyOf": [
            { "const": "lcm", "description": LCM_TARGETS.join(" ") },
            { "type": "array", "minItems": 1, "items": { "type": "string", "minLength": 1 } },
        ]}),
        Kind::Words => {
            json!({ "type": "array", "minItems": 1, "items": kind(&Kind::Text) })
        }
        Kind::Shell => json!({ "anyOf": [
            { "type": "string", "minLength": 1 },
            { "type": "array", "minItems": 1, "items": { "type": "string" } },
        ]}),
        Kind::NotBuilt => json!(false),
    }
}

/// The JSON that a YAML default means.
fn to_json(yaml: &str) -> Value {
    let node = raw::parse(yaml, Origin::File, 0).expect("defaults are YAML");
    from_node(&node.value)
}

fn from_node(value: &raw::Value) -> Value {
    match value {
        raw::Value::Null => Value::Null,
        raw::Value::Scalar { text, plain: true } => {
            serde_json::from_str(text).unwrap_or_else(|_| json!(text))
        }
        raw::Value::Scalar { text, plain: false } => json!(text),
        raw::Value::List(items) => items.iter().map(|i| from_node(&i.value)).collect(),
        raw::Value::Map(entries) => {
            let pairs = entries
                .iter()
                .map(|e| (e.key.clone(), from_node(&e.node.value)));
            Value::Object(pairs.collect())
        }
    }
}
