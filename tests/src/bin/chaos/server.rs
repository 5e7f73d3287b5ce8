//! An S3 server of our own, on this host or another.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;

/// The server; ends when dropped.
pub(crate) struct Server {
    child: Child,
    wrap: Vec<String>,
    address: String,
    pub(crate) port: u16,
}

impl Server {
    /// Starts `program` behind `wrap`, listening on `address`, and makes the bucket `chaos`.
    pub(crate) fn start(program: &str, wrap: &[String], address: &str) -> anyhow::Result<Self> {
        let free = std::net::TcpListener::bind("127.0.0.1:0")?;
        let port = free.local_addr()?.port();
        drop(free);
        let child = wrapped(wrap, program)
            .args(["-H", address, "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context(program.to_owned())?;
        let server = Self {
            child,
            wrap: wrap.to_vec(),
            address: address.to_owned(),
            port,
        };
        for _ in 0..600 {
            if server.make_bucket()? {
                return Ok(server);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        anyhow::bail!("{program} makes no bucket within a minute")
    }

    /// `host:port`.
    pub(crate) fn endpoint(&self) -> String {
        format!("{}:{}", self.address, self.port)
    }

    /// Asks from the server's own host, whose network may not be ours.
    fn make_bucket(&self) -> anyhow::Result<bool> {
        let Self { address, port, .. } = self;
        let ask = format!(
            "exec 3<>/dev/tcp/{address}/{port} && printf \
             'PUT /chaos HTTP/1.1\\r\\nHost: {address}\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n' >&3 \
             && head -n 1 <&3 | grep -q '^HTTP/1.1 200'"
        );
        let status = wrapped(&self.wrap, "bash")
            .args(["-c", &ask])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("bash")?;
        Ok(status.success())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `program`, started by `wrap`.
fn wrapped(wrap: &[String], program: &str) -> Command {
    match wrap.split_first() {
        Some((first, rest)) => {
            let mut command = Command::new(first);
            command.args(rest).arg(program);
            command
        }
        None => Command::new(program),
    }
}

/// How every process finds a server at `endpoint` (`host:port`).
pub(crate) fn s3_variables(endpoint: &str) -> Vec<(String, String)> {
    let url = format!("http://{endpoint}");
    [
        ("AWS_ENDPOINT_URL", url.as_str()),
        ("AWS_ENDPOINT", url.as_str()),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "chaos"),
        ("AWS_SECRET_ACCESS_KEY", "chaos"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}
