//! A store that fails when it is told to, and one that is slow, for tests of everything above it.
//!
//! Every request has a number, from 0. A [`Fault`] names the request that fails and how: before anything
//! happened, after everything happened, or with the reply lost so that object_store's own second try sees the
//! effect of the first.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

/// How a request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The request never reaches the store.
    Before,
    /// The store does it and then reports an error.
    After,
    /// The store does it, the reply is lost, and the client sends the request again.
    LostReply,
}

impl Mode {
    /// Every way to fail.
    pub const ALL: [Self; 3] = [Self::Before, Self::After, Self::LostReply];
}

/// Which request fails, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Number of the request, from 0.
    pub request: u64,
    /// How it fails.
    pub mode: Mode,
}

#[derive(Debug)]
struct Plan {
    faults: Vec<Fault>,
    requests: AtomicU64,
}

impl Plan {
    fn next(&self) -> Option<Mode> {
        let request = self.requests.fetch_add(1, Ordering::SeqCst);
        self.faults
            .iter()
            .find(|fault| fault.request == request)
            .map(|fault| fault.mode)
    }
}

/// A store whose chosen requests fail.
#[derive(Debug, Clone)]
pub struct FaultStore {
    inner: Arc<dyn ObjectStore>,
    plan: Arc<Plan>,
}

impl FaultStore {
    /// Lets the requests that `faults` names fail, and all others pass to `inner`.
    pub fn new(inner: Arc<dyn ObjectStore>, faults: Vec<Fault>) -> Self {
        Self {
            inner,
            plan: Arc::new(Plan {
                faults,
                requests: AtomicU64::new(0),
            }),
        }
    }

    /// How many requests have been made.
    pub fn requests(&self) -> u64 {
        self.plan.requests.load(Ordering::SeqCst)
    }
}

impl fmt::Display for FaultStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultStore({})", self.inner)
    }
}

fn broken() -> object_store::Error {
    object_store::Error::Generic {
        store: "FaultStore",
        source: "an injected fault".into(),
    }
}

#[async_trait]
impl ObjectStore for FaultStore {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        let mode = self.plan.next();
        if mode == Some(Mode::Before) {
            return Err(broken());
        }
        let done = self
            .inner
            .put_opts(location, payload.clone(), opts.clone())
            .await?;
        match mode {
            Some(Mode::After) => Err(broken()),
            Some(Mode::LostReply) => self.inner.put_opts(location, payload, opts).await,
            None | Some(Mode::Before) => Ok(done),
        }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let mode = self.plan.next();
        if mode == Some(Mode::Before) {
            return Err(broken());
        }
        let upload = self.inner.put_multipart_opts(location, opts).await?;
        if mode.is_some() {
            return Err(broken());
        }
        Ok(Box::new(FaultUpload {
            inner: upload,
            plan: self.plan.clone(),
        }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        match self.plan.next() {
            Some(_) => Err(broken()),
            None => self.inner.get_opts(location, options).await,
        }
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let mode = self.plan.next();
        if mode == Some(Mode::Before) {
            return locations.map(|_| Err(broken())).boxed();
        }
        let done = self.inner.delete_stream(locations);
        match mode {
            None => done,
            Some(_) => done.map(|_| Err(broken())).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.plan.next() {
            None => self.inner.list(prefix),
            Some(_) => futures::stream::once(async { Err(broken()) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        match self.plan.next() {
            None => self.inner.list_with_delimiter(prefix).await,
            Some(_) => Err(broken()),
        }
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        match self.plan.next() {
            None => self.inner.copy_opts(from, to, options).await,
            Some(_) => Err(broken()),
        }
    }
}

#[derive(Debug)]
struct FaultUpload {
    inner: Box<dyn MultipartUpload>,
    plan: Arc<Plan>,
}

#[async_trait]
impl MultipartUpload for FaultUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        match self.plan.next() {
            None => self.inner.put_part(data),
            Some(Mode::Before) => Box::pin(async { Err(broken()) }),
            Some(Mode::After | Mode::LostReply) => {
                let part = self.inner.put_part(data);
                Box::pin(async {
                    part.await?;
                    Err(broken())
                })
            }
        }
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let mode = self.plan.next();
        if mode == Some(Mode::Before) {
            return Err(broken());
        }
        let done = self.inner.complete().await?;
        match mode {
            None => Ok(done),
            Some(_) => Err(broken()),
        }
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

/// A store whose reads take longer.
#[derive(Debug)]
pub struct DelayStore {
    inner: Arc<dyn ObjectStore>,
    delay: Duration,
}

impl DelayStore {
    /// Waits `delay` before every read of an object.
    pub fn new(inner: Arc<dyn ObjectStore>, delay: Duration) -> Self {
        Self { inner, delay }
    }
}

impl fmt::Display for DelayStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DelayStore({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for DelayStore {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        self.inner.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        tokio::time::sleep(self.delay).await;
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
