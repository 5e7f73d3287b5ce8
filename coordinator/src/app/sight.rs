//! The HTTP port of a run: bound where the recipe says, its link shown to whoever sits at the terminal.

use std::io::IsTerminal as _;
use std::sync::Arc;

use anyhow::Context as _;
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use distillery_common::recipe::{Recipe, Tls};
use distillery_common::security::Authority;

use super::{Access, advertised};
use crate::http::{Site, serve};
use crate::{console, driver, metrics, service};

/// A bound port, not yet served.
#[derive(Debug)]
pub(super) struct Port {
    listener: TcpListener,
    address: String,
    tls: Option<Arc<ServerConfig>>,
}

/// Binds the port; none where the recipe wants none. One that other hosts reach has the run's certificate.
pub(super) async fn bind(
    recipe: &Recipe,
    access: &Access,
    run_id: &str,
    insecure: bool,
) -> anyhow::Result<Option<Port>> {
    let Some(address) = &recipe.cluster.http else {
        return Ok(None);
    };
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("cluster.http: {address} cannot be bound; name another address, or write off")
    })?;
    let is_loopback = listener.local_addr()?.ip().is_loopback();
    // `--insecure` takes back what the recipe says of TLS, and no more.
    let tls = match is_loopback || (insecure && recipe.cluster.tls == Tls::Off) {
        true => None,
        false => {
            let authority = Authority::derive(access.token(), run_id)?;
            access.write_page_authority(&authority)?;
            Some(authority.page_config()?)
        }
    };
    if !is_loopback && tls.is_none() {
        console::note(format_args!(
            "WARNING: --insecure: the page's key crosses the network in plain text; whoever reads it on the way sees the run"
        ));
    }
    Ok(Some(Port {
        address: advertised(listener.local_addr()?)?,
        listener,
        tls,
    }))
}

/// Serves the page until the handle is aborted, and says where it is. The link holds a key, so that it goes to a
/// terminal or a file of its own, and never into a log.
pub(super) fn open(
    port: Port,
    access: &Access,
    identity: &service::Identity,
    handle: &driver::Handle,
    metrics: &metrics::Metrics,
) -> anyhow::Result<JoinHandle<()>> {
    let site = Site::new(
        identity.clone(),
        access.token().clone(),
        handle.clone(),
        metrics.clone(),
    );
    let tls = port.tls.is_some();
    let link = site.link(&port.address, tls);
    let file = access.write_page(&link)?;
    access.write_page_key(site.key())?;
    if std::io::stderr().is_terminal() {
        console::note(format_args!("page:    {link}"));
    } else {
        let scheme = if tls { "https" } else { "http" };
        console::note(format_args!(
            "page:    {scheme}://{} (the link with its key is in {})",
            port.address,
            file.display()
        ));
    }
    Ok(tokio::spawn(async move {
        serve(port.listener, site, port.tls).await;
    }))
}
