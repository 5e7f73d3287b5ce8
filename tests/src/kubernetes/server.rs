//! The HTTP side of the API server.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::world::{Rule, World, text};
use super::{NAMESPACE, Shared, TOKEN, review};

type Body = BoxBody<Bytes, Infallible>;

/// Pods in a page, whatever is asked for: clients must be able to turn pages.
const PAGE: usize = 2;

/// Answers until the end of the runtime. While the server is away, nobody is answered.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        if *shared.away.borrow() {
            continue;
        }
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let mut away = shared.away.subscribe();
            let service = service_fn(|request| answer(Arc::clone(&shared), request));
            let connection = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                // Whoever left in the middle of an answer is no business of the server's.
                _ = connection => {}
                _ = away.wait_for(|away| *away) => {}
            }
        });
    }
}

/// A request, taken apart.
struct Asked {
    rule: Rule,
    name: Option<String>,
    query: Vec<(String, String)>,
    body: Value,
    patch: String,
}

impl Asked {
    fn value(&self, key: &str) -> Option<&str> {
        let found = self.query.iter().find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str())
    }
}

async fn answer(
    shared: Arc<Shared>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let authorized = request
        .headers()
        .get("authorization")
        .is_some_and(|shown| shown.as_bytes() == format!("Bearer {TOKEN}").as_bytes());
    if !authorized {
        return Ok(status(401, "Unauthorized", "Unauthorized"));
    }
    let (head, body) = request.into_parts();
    let body = match body.collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => return Ok(status(400, "BadRequest", "the body broke off")),
    };
    let patch = head
        .headers
        .get("content-type")
        .and_then(|kind| kind.to_str().ok());
    let patch = patch.unwrap_or_default().to_owned();
    let query: Vec<(String, String)> =
        url::form_urlencoded::parse(head.uri.query().unwrap_or_default().as_bytes())
            .into_owned()
            .collect();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let path = head.uri.path();
    if let Some((code, said)) = review::answer(&shared.world(), &head.method, path, &body) {
        return Ok(reply(code, &said));
    }
    let Some((group, resource, name, namespace)) = route(path) else {
        return Ok(status(
            404,
            "NotFound",
            "the server could not find the requested resource",
        ));
    };
    let watches = query
        .iter()
        .any(|(name, value)| name == "watch" && value == "true");
    let verb = match (&head.method, &name) {
        (&Method::GET, Some(_)) => "get",
        (&Method::GET, None) if watches => "watch",
        (&Method::GET, None) => "list",
        (&Method::POST, _) => "create",
        (&Method::PATCH, _) => "patch",
        (&Method::DELETE, _) => "delete",
        _ => return Ok(status(405, "MethodNotAllowed", "the verb is not known")),
    };
    let rule = Rule {
        verb: verb.into(),
        group,
        resource,
    };
    let asked = Asked {
        rule,
        name,
        query,
        body,
        patch,
    };
    if let Some(refusal) = refuse(&mut shared.world(), &asked, &namespace) {
        return Ok(refusal);
    }
    if verb == "watch" {
        return Ok(watch(shared, &asked));
    }
    let answer = act(&mut shared.world(), &asked);
    shared.announce();
    Ok(answer)
}

/// Group, resource with its subresource, name and namespace of a path.
fn route(path: &str) -> Option<(String, String, Option<String>, String)> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let (group, rest) = match parts.as_slice() {
        ["api", "v1", rest @ ..] => ("", rest),
        ["apis", group, "v1", rest @ ..] => (*group, rest),
        _ => return None,
    };
    let ["namespaces", namespace, resource, rest @ ..] = rest else {
        return None;
    };
    let (name, resource) = match rest {
        [] => (None, (*resource).to_owned()),
        [name] => (Some((*name).to_owned()), (*resource).to_owned()),
        [name, below] => (Some((*name).to_owned()), format!("{resource}/{below}")),
        _ => return None,
    };
    Some((group.to_owned(), resource, name, (*namespace).to_owned()))
}

/// What stands before every request: planned refusals, the namespace, the Role.
fn refuse(world: &mut World, asked: &Asked, namespace: &str) -> Option<Response<Body>> {
    let rule = &asked.rule;
    let planned = world
        .refusals
        .iter()
        .position(|refusal| refusal.verb == rule.verb && refusal.resource == rule.resource);
    if let Some(at) = planned {
        let refusal = world.refusals.remove(at);
        world.refused += 1;
        let mut answer = status(refusal.code, "Refused", "refused by the test");
        if let Some(seconds) = refusal.retry_after {
            answer.headers_mut().insert("retry-after", seconds.into());
        }
        return Some(answer);
    }
    let mut needed = vec![rule.clone()];
    // To apply is to create where there is nothing yet.
    let name = asked.name.as_deref().unwrap_or_default();
    if rule.verb == "patch" && rule.resource == "secrets" && !world.secrets.contains_key(name) {
        let verb = "create".to_owned();
        needed.push(Rule {
            verb,
            ..rule.clone()
        });
    }
    for rule in needed {
        if namespace != NAMESPACE || !world.allows(&rule) {
            let message = format!(
                "{} is forbidden: User \"system:serviceaccount:{NAMESPACE}:distillery-coordinator\" cannot {} resource \"{}\" in API group \"{}\" in the namespace \"{namespace}\"",
                rule.resource, rule.verb, rule.resource, rule.group
            );
            world.forbidden.push(rule);
            return Some(status(403, "Forbidden", &message));
        }
        world.asked.insert(rule);
    }
    None
}

fn act(world: &mut World, asked: &Asked) -> Response<Body> {
    let name = asked.name.as_deref().unwrap_or_default();
    match (asked.rule.verb.as_str(), asked.rule.resource.as_str()) {
        ("get", "jobs") => found(world.jobs.get(name).cloned(), "jobs.batch", name),
        ("create", "jobs") => create_job(world, asked.body.clone()),
        ("delete", "jobs") => delete_job(world, asked, name),
        ("list", "pods") => list(world, asked),
        ("delete", "pods") => delete_pod(world, asked, name),
        ("patch", "pods/status") => patch_status(world, asked, name),
        ("patch", "secrets") => apply_secret(world, asked, name),
        (verb, resource) => {
            let message = format!("the fake does not know how to {verb} {resource}");
            status(501, "NotImplemented", &message)
        }
    }
}

fn found(object: Option<Value>, kind: &str, name: &str) -> Response<Body> {
    match object {
        Some(object) => reply(200, &object),
        None => status(404, "NotFound", &format!("{kind} {name:?} not found")),
    }
}

fn create_job(world: &mut World, mut job: Value) -> Response<Body> {
    let name = text(&job, "/metadata/name");
    if world.jobs.contains_key(&name) {
        return status(
            409,
            "AlreadyExists",
            &format!("jobs.batch {name:?} already exists"),
        );
    }
    let restart = &job["spec"]["template"]["spec"]["restartPolicy"];
    if name.is_empty() || name.len() > 63 || restart != "Never" {
        let message = format!("Job.batch {name:?} is invalid");
        return status(422, "Invalid", &message);
    }
    let uid = world.uid();
    world.jobs_made.push(uid.clone());
    job["metadata"]["uid"] = json!(uid);
    job["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
    job["status"] = json!({});
    world.touch(&mut job);
    world.jobs.insert(name, job.clone());
    reply(201, &job)
}

/// A refusal when the preconditions of a deletion do not hold.
fn conflict(asked: &Asked, object: &Value) -> Option<Response<Body>> {
    let wanted = asked.body["preconditions"]["uid"].as_str()?;
    let message =
        format!("the UID in the precondition ({wanted}) does not match the UID in record");
    (object["metadata"]["uid"] != wanted).then(|| status(409, "Conflict", &message))
}

fn delete_job(world: &mut World, asked: &Asked, name: &str) -> Response<Body> {
    let Some(job) = world.jobs.get(name).cloned() else {
        return found(None, "jobs.batch", name);
    };
    if let Some(conflict) = conflict(asked, &job) {
        return conflict;
    }
    world.delete_job(name);
    reply(
        200,
        &json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success" }),
    )
}

fn delete_pod(world: &mut World, asked: &Asked, name: &str) -> Response<Body> {
    let Some(pod) = world.pods.get(name).cloned() else {
        return found(None, "pods", name);
    };
    if let Some(conflict) = conflict(asked, &pod) {
        return conflict;
    }
    world.delete_pod(name, asked.body["gracePeriodSeconds"].as_i64());
    reply(200, &pod)
}

fn patch_status(world: &mut World, asked: &Asked, name: &str) -> Response<Body> {
    let Some(pod) = world.pods.get(name).cloned() else {
        return found(None, "pods", name);
    };
    if asked.patch != "application/strategic-merge-patch+json" {
        return status(415, "UnsupportedMediaType", &asked.patch);
    }
    let wanted = &asked.body["metadata"]["uid"];
    if wanted.is_string() && *wanted != pod["metadata"]["uid"] {
        return status(409, "Conflict", "the object has been replaced");
    }
    world.change_pod(name, |pod| {
        for (key, value) in asked.body["status"].as_object().into_iter().flatten() {
            // Conditions are merged by their type.
            if key == "conditions" {
                for new in value.as_array().into_iter().flatten() {
                    let field = |key: &str| text(new, &format!("/{key}"));
                    let (kind, state) = (field("type"), field("status"));
                    super::world::condition(
                        pod,
                        &kind,
                        &state,
                        &field("reason"),
                        &field("message"),
                    );
                }
            } else {
                pod["status"][key] = value.clone();
            }
        }
    });
    found(world.pods.get(name).cloned(), "pods", name)
}

fn apply_secret(world: &mut World, asked: &Asked, name: &str) -> Response<Body> {
    if asked.patch != "application/apply-patch+yaml" || asked.value("fieldManager").is_none() {
        return status(415, "UnsupportedMediaType", &asked.patch);
    }
    let mut secret = asked.body.clone();
    let uid = match world.secrets.get(name) {
        Some(old) => text(old, "/metadata/uid"),
        None => world.uid(),
    };
    secret["metadata"]["uid"] = json!(uid);
    world.touch(&mut secret);
    world.secrets.insert(name.to_owned(), secret.clone());
    reply(200, &secret)
}

/// Whether a pod has the labels of `key=value,…`.
fn selected(pod: &Value, selector: &str) -> bool {
    selector
        .split(',')
        .filter(|one| !one.is_empty())
        .all(|one| {
            one.split_once('=')
                .is_some_and(|(key, value)| pod["metadata"]["labels"][key] == value)
        })
}

fn list(world: &World, asked: &Asked) -> Response<Body> {
    let selector = asked.value("labelSelector").unwrap_or_default();
    let from: usize = asked
        .value("continue")
        .and_then(|from| from.parse().ok())
        .unwrap_or(0);
    let all: Vec<&Value> = world
        .pods
        .values()
        .filter(|pod| selected(pod, selector))
        .collect();
    let items: Vec<&Value> = all.iter().skip(from).take(PAGE).copied().collect();
    let mut metadata = json!({ "resourceVersion": world.version().to_string() });
    if from + PAGE < all.len() {
        metadata["continue"] = json!((from + PAGE).to_string());
    }
    reply(
        200,
        &json!({ "kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": items }),
    )
}

/// Streams what changes after the version that was asked for, until the client's time is up.
fn watch(shared: Arc<Shared>, asked: &Asked) -> Response<Body> {
    let version = asked
        .value("resourceVersion")
        .and_then(|version| version.parse().ok());
    let seconds = asked
        .value("timeoutSeconds")
        .and_then(|n| n.parse().ok())
        .unwrap_or(300);
    let selector = asked.value("labelSelector").unwrap_or_default().to_owned();
    let (sender, lines) = tokio::sync::mpsc::channel::<Value>(64);
    tokio::spawn(async move {
        let mut changed = shared.changed.subscribe();
        let mut seen: u64 = version.unwrap_or(0);
        let follow = async {
            loop {
                let (news, now, expired) = {
                    let mut world = shared.world();
                    let expired = world.is_too_old(seen);
                    world.expired += usize::from(expired);
                    let news: Vec<Value> = world
                        .events
                        .iter()
                        .filter(|(at, _, pod)| *at > seen && selected(pod, &selector))
                        .map(|(_, kind, pod)| json!({ "type": kind, "object": pod }))
                        .collect();
                    (news, world.version(), expired)
                };
                if expired {
                    let error = json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                        "reason": "Expired", "code": 410, "message": format!("too old resource version: {seen}") });
                    let _ = sender
                        .send(json!({ "type": "ERROR", "object": error }))
                        .await;
                    return;
                }
                let idle = news.is_empty();
                for event in news {
                    if sender.send(event).await.is_err() {
                        return;
                    }
                }
                if idle && now > seen {
                    let object = json!({ "kind": "Pod", "apiVersion": "v1",
                        "metadata": { "resourceVersion": now.to_string(), "creationTimestamp": null }, "spec": { "containers": null }, "status": {} });
                    let _ = sender
                        .send(json!({ "type": "BOOKMARK", "object": object }))
                        .await;
                }
                seen = now;
                if changed.changed().await.is_err() {
                    return;
                }
            }
        };
        // However it ends, the client sees the end of the stream.
        let _ = tokio::time::timeout(Duration::from_secs(seconds), follow).await;
    });
    let lines = tokio_stream::wrappers::ReceiverStream::new(lines)
        .map(|line| Ok(Frame::data(Bytes::from(format!("{line}\n")))));
    let mut answer = Response::new(BodyExt::boxed(StreamBody::new(lines)));
    json_type(&mut answer);
    answer
}

fn json_type(answer: &mut Response<Body>) {
    let kind = hyper::header::HeaderValue::from_static("application/json");
    answer.headers_mut().insert("content-type", kind);
}

fn reply(code: u16, object: &Value) -> Response<Body> {
    let mut answer = Response::new(Full::new(Bytes::from(object.to_string())).boxed());
    *answer.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json_type(&mut answer);
    answer
}

fn status(code: u16, reason: &str, message: &str) -> Response<Body> {
    reply(
        code,
        &json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "reason": reason, "code": code, "message": message,
        }),
    )
}
