//! What an API server answers whoever wants to know what it is, and what it would allow.

use hyper::Method;
use serde_json::{Value, json};

use super::NAMESPACE;
use super::world::{Rule, World, text};

/// The version that this stands in for.
const VERSION: &str = "v1.36.0";
/// Where one asks what one may do.
const REVIEWS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";

/// The answer with its code, where such a question was asked. These every account may ask, so no Role says so.
pub(super) fn answer(
    world: &World,
    method: &Method,
    path: &str,
    body: &Value,
) -> Option<(u16, Value)> {
    match (method, path) {
        (&Method::GET, "/version") => Some((
            200,
            json!({
                "major": "1", "minor": "36", "gitVersion": VERSION, "gitCommit": "0", "gitTreeState": "clean",
                "buildDate": "2026-01-01T00:00:00Z", "goVersion": "go1", "compiler": "gc", "platform": "linux/amd64",
            }),
        )),
        (&Method::POST, REVIEWS) => Some((201, reviewed(world, body))),
        _ => None,
    }
}

fn reviewed(world: &World, body: &Value) -> Value {
    let field = |key: &str| text(body, &format!("/spec/resourceAttributes/{key}"));
    let (resource, below) = (field("resource"), field("subresource"));
    let rule = Rule {
        verb: field("verb"),
        group: field("group"),
        resource: match below.as_str() {
            "" => resource,
            below => format!("{resource}/{below}"),
        },
    };
    let allowed = field("namespace") == NAMESPACE && world.allows(&rule);
    let mut review = body.clone();
    review["status"] = json!({ "allowed": allowed });
    review
}
