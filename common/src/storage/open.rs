//! From a URI to a store.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, Hasher as _};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientConfigKey, ObjectStore, RetryConfig};
use url::Url;

use super::{Error, Store};
use crate::cryptography;

/// Longest time of one request with its body.
const REQUEST_TIMEOUT: &str = "120 seconds";
/// Tries that object_store makes of one request.
const REQUEST_RETRIES: usize = 5;
/// All tries of one request end within this time.
const RETRY_TIMEOUT: Duration = Duration::from_secs(120);

/// The stores behind `memory://name`. The one thing here that the process shares: a name must mean the same
/// store to every part of the process, as a path does, and nothing else could carry it between them.
static NAMED_MEMORY: Mutex<BTreeMap<String, Arc<InMemory>>> = Mutex::new(BTreeMap::new());

/// What becomes of a folder that is not there.
#[derive(Debug, Clone, Copy)]
pub(super) enum Missing {
    Make,
    Refuse,
}

/// Opens the store that `uri` names.
pub(super) fn open(uri: &str, missing: Missing) -> Result<Store, Error> {
    let Some((scheme, rest)) = uri.split_once("://") else {
        return open_folder(Path::new(uri), uri, missing);
    };
    match scheme {
        "file" => {
            let url = parse(uri)?;
            let path = url.to_file_path().map_err(|()| {
                bad(
                    uri,
                    "a file URI has three slashes and no host, as in file:///data/run",
                )
            })?;
            open_folder(&path, uri, missing)
        }
        "memory" => open_memory(uri, rest),
        "s3" | "s3a" | "gs" | "az" | "adl" | "azure" | "abfs" | "abfss" => open_cloud(uri, scheme),
        _ => Err(bad(
            uri,
            "the scheme is not known; write a path, or file://, memory://, s3://, gs:// or az://",
        )),
    }
}

/// Random text for names that must not meet. Its only source is the process's own hash key, so that neither
/// the clock nor a generator is asked.
pub(super) fn nonce() -> String {
    let state = std::collections::hash_map::RandomState::new();
    format!(
        "{:016x}-{}",
        state.build_hasher().finish(),
        std::process::id()
    )
}

fn open_folder(path: &Path, uri: &str, missing: Missing) -> Result<Store, Error> {
    if path.as_os_str().is_empty() {
        return Err(bad(uri, "it is empty; write a path or a URI"));
    }
    let failed = |error: std::io::Error| bad(uri, &format!("{}: {error}", path.display()));
    let absolute = std::path::absolute(path).map_err(failed)?;
    match missing {
        Missing::Make => private_folder(&absolute).map_err(failed)?,
        Missing::Refuse if absolute.is_dir() => {}
        Missing::Refuse => return Err(bad(uri, "there is no such folder")),
    }
    let folder = absolute.canonicalize().map_err(failed)?;
    let store = LocalFileSystem::new_with_prefix(&folder)
        .map_err(|error| bad(uri, &error.to_string()))?
        .with_fsync(true);
    Ok(Store {
        inner: Arc::new(store),
        uri: format!("file://{}", folder.display()).into(),
        folder: Some(Arc::new(folder)),
    })
}

/// Makes the folder for its owner alone, and those above it, which may be other people's too, as any program would. One
/// that exists is left as it is.
fn private_folder(path: &Path) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let mut builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    match builder.create(path) {
        Err(_) if path.is_dir() => Ok(()),
        made => made,
    }
}

fn open_memory(uri: &str, name: &str) -> Result<Store, Error> {
    if !name.split('/').all(super::layout::is_segment) {
        return Err(bad(
            uri,
            "a store in memory has a plain name, as in memory://test",
        ));
    }
    // A panic elsewhere cannot leave the map half changed.
    let mut named = NAMED_MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    let store = named.entry(name.to_owned()).or_default().clone();
    Ok(Store::over(store, uri))
}

fn open_cloud(uri: &str, scheme: &str) -> Result<Store, Error> {
    let url = parse(uri)?;
    if url.host_str().is_none_or(str::is_empty) {
        return Err(bad(uri, "it names no bucket"));
    }
    let path = url.path().trim_matches('/');
    if !path.is_empty() && !path.split('/').all(super::layout::is_segment) {
        return Err(bad(uri, "folders are made of letters, digits and `._=-`"));
    }
    cryptography::choose();
    let backend = match scheme {
        "s3" | "s3a" => s3(uri, AmazonS3Builder::from_env()),
        "gs" => google(uri),
        _ => azure(uri, MicrosoftAzureBuilder::from_env()),
    }?;
    let inner: Arc<dyn ObjectStore> = if path.is_empty() {
        backend
    } else {
        Arc::new(PrefixStore::new(backend, path))
    };
    Ok(Store::over(inner, uri.trim_end_matches('/')))
}

/// Refuses an endpoint in the clear that nobody has allowed, since every request to it would fail in words of the HTTP
/// client's. `named` is the service in the names of variables.
fn refuse_plain_http(
    uri: &str,
    endpoint: Option<&str>,
    allowed: Option<&str>,
    named: &str,
) -> Result<(), Error> {
    // As object_store reads a boolean; what is none it refuses itself.
    let refused = allowed.is_none_or(|word| {
        ["0", "false", "off", "no", "n"].contains(&word.to_ascii_lowercase().as_str())
    });
    match endpoint {
        Some(endpoint) if refused && endpoint.starts_with("http://") => Err(bad(
            uri,
            &format!(
                "the endpoint in the environment, {}, is in the clear; set {named}_ALLOW_HTTP=true to use it all the same",
                shown(endpoint)
            ),
        )),
        _ => Ok(()),
    }
}

fn s3(uri: &str, builder: AmazonS3Builder) -> Result<Arc<dyn ObjectStore>, Error> {
    let [timeout, http] =
        [ClientConfigKey::Timeout, ClientConfigKey::AllowHttp].map(AmazonS3ConfigKey::Client);
    let mut builder = builder.with_url(bucket_only(uri));
    let endpoint = [AmazonS3ConfigKey::S3Endpoint, AmazonS3ConfigKey::Endpoint]
        .iter()
        .find_map(|key| builder.get_config_value(key));
    let allowed = builder.get_config_value(&http);
    refuse_plain_http(uri, endpoint.as_deref(), allowed.as_deref(), "AWS")?;
    if builder.get_config_value(&timeout).is_none() {
        builder = builder.with_config(timeout, REQUEST_TIMEOUT);
    }
    let built = builder.with_retry(retries()).build();
    Ok(Arc::new(
        built.map_err(|error| bad(uri, &error.to_string()))?,
    ))
}

fn google(uri: &str) -> Result<Arc<dyn ObjectStore>, Error> {
    let timeout = GoogleConfigKey::Client(ClientConfigKey::Timeout);
    let mut builder = GoogleCloudStorageBuilder::from_env().with_url(bucket_only(uri));
    if builder.get_config_value(&timeout).is_none() {
        builder = builder.with_config(timeout, REQUEST_TIMEOUT);
    }
    let built = builder.with_retry(retries()).build();
    Ok(Arc::new(
        built.map_err(|error| bad(uri, &error.to_string()))?,
    ))
}

fn azure(uri: &str, builder: MicrosoftAzureBuilder) -> Result<Arc<dyn ObjectStore>, Error> {
    let [timeout, http] =
        [ClientConfigKey::Timeout, ClientConfigKey::AllowHttp].map(AzureConfigKey::Client);
    let mut builder = builder.with_url(bucket_only(uri));
    let endpoint = builder.get_config_value(&AzureConfigKey::Endpoint);
    let allowed = builder.get_config_value(&http);
    refuse_plain_http(uri, endpoint.as_deref(), allowed.as_deref(), "AZURE")?;
    if builder.get_config_value(&timeout).is_none() {
        builder = builder.with_config(timeout, REQUEST_TIMEOUT);
    }
    let built = builder.with_retry(retries()).build();
    Ok(Arc::new(
        built.map_err(|error| bad(uri, &error.to_string()))?,
    ))
}

/// `scheme://bucket` of a URI that has been checked.
fn bucket_only(uri: &str) -> &str {
    let host = uri.find("://").map_or(0, |at| at + 3);
    uri[host..].find('/').map_or(uri, |at| &uri[..host + at])
}

fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig::default(),
        max_retries: REQUEST_RETRIES,
        retry_timeout: RETRY_TIMEOUT,
    }
}

fn parse(uri: &str) -> Result<Url, Error> {
    let url = Url::parse(uri).map_err(|error| bad(uri, &error.to_string()))?;
    // `abfss://container@account.…` is how that scheme spells a container; everywhere else this is a user.
    let container = matches!(url.scheme(), "abfs" | "abfss") && url.password().is_none();
    if url.password().is_some() || (!url.username().is_empty() && !container) {
        return Err(bad(
            uri,
            "credentials do not belong in a URI; set them in the environment",
        ));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(bad(
            uri,
            "options do not belong in a URI; set them in the environment",
        ));
    }
    Ok(url)
}

fn bad(uri: &str, reason: &str) -> Error {
    Error::BadUri {
        uri: shown(uri),
        reason: reason.to_owned(),
    }
}

/// The URI without what may be a secret: user, password, query.
fn shown(uri: &str) -> String {
    let plain = uri.split(['?', '#']).next().unwrap_or_default();
    match (plain.split_once("://"), plain.rfind('@')) {
        (Some((scheme, _)), Some(at)) => format!("{scheme}://…{}", &plain[at..]),
        _ => plain.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(uri: &str) -> String {
        Store::open(uri).expect_err(uri).to_string()
    }

    #[test]
    fn a_secret_in_a_uri_is_refused_and_not_repeated() {
        for uri in [
            "s3://AKIA:hunter2@bucket/run",
            "s3://bucket/run?secret=hunter2",
            "gs://hunter2@bucket/run",
            "az://bucket/run#hunter2",
        ] {
            let message = refusal(uri);
            assert!(!message.contains("hunter2"), "{message}");
            assert!(message.contains("environment"), "{message}");
        }
    }

    #[test]
    fn unknown_and_broken_uris_are_explained() {
        for (uri, part) in [
            ("", "empty"),
            ("ftp://host/x", "scheme"),
            ("http://host/x", "scheme"),
            ("file://host/x", "three slashes"),
            ("memory://", "plain name"),
            ("memory://a b", "plain name"),
            ("s3:///run", "names no bucket"),
            ("s3://bucket/a//b", "folders"),
        ] {
            let message = refusal(uri);
            assert!(message.contains(part), "{uri}: {message}");
        }
    }

    #[test]
    fn an_endpoint_in_the_clear_is_refused_until_it_is_allowed() {
        let plain = "http://127.0.0.1:1";
        let amazon = || {
            AmazonS3Builder::new()
                .with_endpoint(plain)
                .with_access_key_id("a")
                .with_secret_access_key("b")
        };
        let refused = s3("s3://bucket/x", amazon()).expect_err("in the clear");
        let said = refused.to_string();
        assert!(said.contains("AWS_ALLOW_HTTP=true"), "{said}");
        assert!(said.contains(plain), "{said}");
        s3("s3://bucket/x", amazon().with_allow_http(true)).expect("it is allowed");
        let microsoft = || {
            MicrosoftAzureBuilder::new()
                .with_endpoint(plain.to_owned())
                .with_account("a")
                .with_bearer_token_authorization("b")
        };
        let refused = azure("az://bucket/x", microsoft()).expect_err("in the clear");
        let said = refused.to_string();
        assert!(said.contains("AZURE_ALLOW_HTTP=true"), "{said}");
        azure("az://bucket/x", microsoft().with_allow_http(true)).expect("it is allowed");
    }

    #[tokio::test]
    async fn a_name_in_memory_is_one_store() {
        let key = super::super::layout::run_record();
        let body = bytes::Bytes::from_static(b"x");
        let here = Store::open("memory://open-test").expect("a plain name");
        here.put(&key, body.clone()).await.expect("memory takes it");
        let there = Store::open("memory://open-test").expect("a plain name");
        assert_eq!(there.get(&key).await.expect("it is there"), body);
        let other = Store::open("memory://open-test-2").expect("a plain name");
        assert!(other.get(&key).await.is_err());
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_is_made_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let parent = tempfile::tempdir().expect("a temporary folder");
        let path = parent.path().join("runs/one");
        let uri = path.display().to_string();
        assert!(
            refusal(&uri).contains("no such folder"),
            "{}",
            refusal(&uri)
        );
        assert!(
            !parent.path().join("runs").exists(),
            "looking makes nothing"
        );
        let store = Store::open_or_create(&uri).expect("the folder can be made");
        assert!(store.uri().starts_with("file:///"), "{}", store.uri());
        let mode = |path: &Path| {
            let made = std::fs::metadata(path).expect("it was made");
            made.permissions().mode() & 0o777
        };
        assert_eq!(mode(&path), 0o700);
        // What this process makes when nobody says how: a parent may be shared.
        let usual = parent.path().join("usual");
        std::fs::create_dir(&usual).expect("the folder can be made");
        assert_eq!(mode(&parent.path().join("runs")), mode(&usual));
        Store::open_or_create(&uri).expect("it is there already");
        let file = parent.path().join("file");
        std::fs::write(&file, "x").expect("writable");
        let on_a_file = Store::open_or_create(&file.display().to_string());
        assert!(on_a_file.is_err(), "a file is no folder");
    }
}
