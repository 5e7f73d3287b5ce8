//! Schedulers of clusters, as far as they can be reached from here.

use std::path::PathBuf;

use tokio::net::TcpStream;

use super::{Check, LOOK, answer};

/// Whether Slurm's controller answers.
pub(super) async fn slurm() -> Check {
    const NAME: &str = "Slurm";
    match answer("sinfo", &["--noheader", "--format=%P"], LOOK).await {
        None => Check::well(NAME, "not here; only its launcher needs it"),
        Some(Ok(partitions)) => {
            let partitions: Vec<_> = partitions.lines().map(str::trim).collect();
            Check::well(NAME, format!("partitions {}", partitions.join(", ")))
        }
        Some(Err(why)) => Check::warn(
            NAME,
            format!("sinfo does not answer: {why}"),
            "its launcher cannot start workers until slurmctld answers (`scontrol ping`)",
        ),
    }
}

/// Whether something listens where the API server should be.
pub(super) async fn kubernetes() -> Check {
    const NAME: &str = "Kubernetes";
    let Some((from, server)) = api_server() else {
        return Check::well(NAME, "not here; only its launcher needs it");
    };
    let help = "its launcher cannot start workers until the API server is reached";
    let Some(address) = address_of(&server) else {
        return Check::warn(NAME, format!("{from} names no server: {server:?}"), help);
    };
    match tokio::time::timeout(LOOK, TcpStream::connect(&address)).await {
        Ok(Ok(_)) => Check::well(NAME, format!("{server} is reached ({from})")),
        Ok(Err(error)) => Check::warn(NAME, format!("{server} is not reached: {error}"), help),
        Err(_) => Check::warn(NAME, format!("{server} does not answer"), help),
    }
}

/// Where the API server is, and who says so.
fn api_server() -> Option<(String, String)> {
    let inside = std::env::var("KUBERNETES_SERVICE_HOST").ok();
    if let Some(host) = inside {
        let port = std::env::var("KUBERNETES_SERVICE_PORT").unwrap_or_else(|_| "443".into());
        let host = if host.contains(':') {
            format!("[{host}]")
        } else {
            host
        };
        return Some(("this pod".into(), format!("https://{host}:{port}")));
    }
    let path = match std::env::var_os("KUBECONFIG") {
        Some(paths) => std::env::split_paths(&paths).next()?,
        None => PathBuf::from(std::env::var_os("HOME")?).join(".kube/config"),
    };
    let text = std::fs::read_to_string(&path).ok()?;
    let server = text.lines().find_map(|line| {
        let line = line.trim().trim_start_matches("- ");
        line.strip_prefix("server:")
    });
    let server = server.unwrap_or_default().trim().trim_matches(['"', '\'']);
    Some((path.display().to_string(), server.to_owned()))
}

/// `host:port` of a URL.
fn address_of(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split('/').next()?;
    let has_port = authority
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let port = match scheme {
        _ if has_port => return Some(authority.to_owned()),
        "https" => 443,
        "http" => 80,
        _ => return None,
    };
    (!authority.is_empty()).then(|| format!("{authority}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_an_api_server_is_read_from_its_url() {
        for (url, address) in [
            ("https://10.0.0.1:6443", Some("10.0.0.1:6443")),
            (
                "https://k8s.example.com/k8s/c-1",
                Some("k8s.example.com:443"),
            ),
            ("https://[fd00::1]:6443", Some("[fd00::1]:6443")),
            ("", None),
            ("ftp://x", None),
        ] {
            assert_eq!(address_of(url).as_deref(), address, "{url}");
        }
    }
}
