use super::*;

const RUN: &str = "0198f3a2-7c11-7e55-b9f0-3f7a4c1d2e90";

fn token(byte: u8) -> Token {
    Token([byte; 32])
}

#[test]
fn both_sides_derive_the_same_certificates() {
    let one = Authority::derive(&token(7), RUN).expect("derives");
    let two = Authority::derive(&token(7), RUN).expect("derives");
    assert_eq!(one.certificate_der, two.certificate_der);
    assert_eq!(one.server.certificate_der, two.server.certificate_der);
    assert_eq!(one.member.certificate_der, two.member.certificate_der);
    let other_token = Authority::derive(&token(8), RUN).expect("derives");
    let other_run = Authority::derive(&token(7), "another").expect("derives");
    assert_ne!(one.fingerprint(), other_token.fingerprint());
    assert_ne!(one.fingerprint(), other_run.fingerprint());
}

#[test]
fn only_the_right_token_is_admitted() {
    let right = token(1);
    let header = format!("Bearer {}", right.reveal());
    assert!(right.admits(Some(header.as_bytes())));
    assert!(right.matches(&token(1)));
    assert!(!token(2).admits(Some(header.as_bytes())));
    assert!(!token(2).matches(&right));
    assert!(!right.admits(None));
    assert!(!right.admits(Some(b"Bearer ")));
    assert!(!right.admits(Some(&header.as_bytes()[..header.len() - 1])));

    let mut require = RequireToken::new(right);
    let shown = |token: &Token| ShowToken::new(token).call(tonic::Request::new(()));
    assert!(require.call(shown(&token(1)).expect("shows")).is_ok());
    let refused = require.call(shown(&token(2)).expect("shows"));
    let status = refused.expect_err("a wrong token is refused");
    assert_eq!(status.code(), tonic::Code::Unauthenticated);
}

#[test]
fn a_token_file_is_made_once_and_private() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("token");
    let made = Token::load_or_create(&path).expect("made");
    let mode = std::fs::metadata(&path)
        .expect("is there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = Token::load_or_create(&path).expect("read");
    assert!(made.matches(&again));

    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("chmod");
    let error = Token::load(&path).expect_err("others could read it");
    assert!(error.to_string().contains("chmod 600"), "{error}");
}

#[test]
fn makers_at_the_same_time_agree_on_one_token() {
    const MAKERS: usize = 16;
    for _ in 0..50 {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("token");
        let start = std::sync::Barrier::new(MAKERS);
        let made: Vec<Token> = std::thread::scope(|scope| {
            let make = || {
                start.wait();
                Token::load_or_create(&path).expect("made or read, and never half of it")
            };
            let makers: Vec<_> = (0..MAKERS).map(|_| scope.spawn(make)).collect();
            let ended = makers.into_iter().map(|maker| maker.join().expect("ends"));
            ended.collect()
        });
        let kept = Token::load(&path).expect("there");
        assert!(made.iter().all(|token| token.matches(&kept)));
        let files = std::fs::read_dir(folder.path()).expect("readable").count();
        assert_eq!(files, 1, "those that lost leave nothing behind");
    }
}

#[test]
fn a_token_file_that_holds_none_is_left_for_its_owner_to_judge() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("token");
    std::fs::write(&path, "").expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("chmod");
    let error = Token::load_or_create(&path).expect_err("it holds no token");
    assert!(matches!(error, Error::NotAToken(0)), "{error}");
    assert_eq!(std::fs::read(&path).expect("there"), b"");
}

#[test]
fn a_join_string_reads_what_it_prints_and_hides_its_token() {
    for tls in [true, false] {
        let join = Join::new("127.0.0.1:4000", RUN, token(9), tls).expect("makes");
        let read = Join::parse(&join.reveal(), false).expect("reads");
        assert_eq!(read.address(), "127.0.0.1:4000");
        assert_eq!(read.run_id(), RUN);
        assert!(read.token().matches(join.token()));
        assert_eq!(read.fingerprint(), join.fingerprint());
        let secret = join.token().reveal();
        assert!(!format!("{join} {join:?} {:?}", join.token()).contains(&secret));
    }
}

#[test]
fn a_broken_join_string_says_what_is_missing() {
    let whole = Join::new("host:4000", RUN, token(9), true)
        .expect("makes")
        .reveal();
    let (_, secret) = whole.rsplit_once('#').expect("has a token");
    let check = |text: &str, part: &str| {
        let error = Join::parse(text, false).expect_err("is broken").to_string();
        assert!(error.contains(part), "{text}: {error}");
        assert!(!error.contains(secret), "{error}");
    };
    check("host:4000", "https:// in front");
    check("https://host:4000/run", "no #TOKEN");
    check(&whole.replace(":4000", ""), "no port");
    check(&whole.replace(RUN, ""), "no run id");
    check(&whole.replace(&format!("#{secret}"), ""), "no fingerprint");
    check(&whole[..whole.len() - 1], "64 hexadecimal digits");
    check(&format!("http://host:4000/{RUN}#{secret}"), "--insecure");
    assert!(Join::parse(&format!("http://host:4000/{RUN}#{secret}"), true).is_ok());
}

#[test]
fn a_fingerprint_of_another_token_is_explained() {
    let one = Join::new("host:4000", RUN, token(1), true).expect("makes");
    let two = Join::new("host:4000", RUN, token(2), true).expect("makes");
    let mixed = one
        .reveal()
        .replace(&one.token().reveal(), &two.token().reveal());
    let error = Join::parse(&mixed, false)
        .expect_err("is mixed")
        .to_string();
    assert!(error.contains("copy it again as a whole"), "{error}");
}

/// The message used to repeat what stood in the fingerprint's place.
#[test]
fn a_token_in_the_fingerprints_place_is_not_told() {
    let join = Join::new("host:4000", RUN, token(1), true).expect("makes");
    let (secret, fingerprint) = (join.token().reveal(), join.fingerprint().expect("TLS"));
    let swapped = format!("https://host:4000/{RUN}#{secret}#{fingerprint}");
    let error = Join::parse(&swapped, false).expect_err("is swapped");
    assert!(!format!("{error} {error:?}").contains(&secret), "{error}");
}

#[test]
fn loopback_is_this_host_alone() {
    for here in ["127.0.0.1:1", "localhost:1", "[::1]:1", "127.8.8.8:1"] {
        assert!(join::is_loopback(here), "{here}");
    }
    for elsewhere in [
        "0.0.0.0:1",
        "10.0.0.1:1",
        "localhost.example.org:1",
        "127.0.0.1.example.org:1",
    ] {
        assert!(!join::is_loopback(elsewhere), "{elsewhere}");
    }
}

mod handshake {
    use super::*;
    use crate::proto::wire;
    use crate::proto::wire::coordinator_client::CoordinatorClient;
    use crate::proto::wire::coordinator_server::{Coordinator, CoordinatorServer};
    use tokio::sync::mpsc;
    use tokio_rustls::TlsAcceptor;
    use tonic::transport::{Certificate, ClientTlsConfig, Identity};
    use tonic::{Request, Response, Status, Streaming};

    struct OnlyStatus;

    #[tonic::async_trait]
    impl Coordinator for OnlyStatus {
        type SessionStream = futures::stream::Empty<Result<wire::CoordinatorMessage, Status>>;

        async fn session(
            &self,
            _: Request<Streaming<wire::WorkerMessage>>,
        ) -> Result<Response<Self::SessionStream>, Status> {
            Err(Status::unimplemented("not asked for here"))
        }

        async fn status(
            &self,
            _: Request<wire::StatusRequest>,
        ) -> Result<Response<wire::StatusReply>, Status> {
            Ok(Response::new(wire::StatusReply::default()))
        }

        async fn control(
            &self,
            _: Request<wire::ControlRequest>,
        ) -> Result<Response<wire::ControlReply>, Status> {
            Err(Status::unimplemented("not asked for here"))
        }
    }

    async fn ask(join: &Join, tls: ClientTlsConfig) -> Result<(), String> {
        let channel = tonic::transport::Endpoint::from_shared(join.url())
            .and_then(|endpoint| endpoint.tls_config(tls))
            .map_err(|error| error.to_string())?
            .connect()
            .await
            .map_err(|error| format!("{error:?}"))?;
        CoordinatorClient::with_interceptor(channel, ShowToken::new(join.token()))
            .status(wire::StatusRequest {})
            .await
            .map(drop)
            .map_err(|status| format!("{status:?}"))
    }

    /// A server of the run of `token(1)`; gives its address and the errors of handshakes.
    async fn serve() -> (String, mpsc::UnboundedReceiver<String>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("binds");
        let address = listener.local_addr().expect("bound").to_string();
        let authority = Authority::derive(&token(1), RUN).expect("derives");
        let acceptor = TlsAcceptor::from(authority.server_config().expect("fits"));
        let service = CoordinatorServer::with_interceptor(OnlyStatus, RequireToken::new(token(1)));
        let (failed, failures) = mpsc::unbounded_channel();
        let incoming = futures::stream::unfold(listener, move |listener| {
            let (acceptor, failed) = (acceptor.clone(), failed.clone());
            async move {
                loop {
                    let (stream, _) = listener.accept().await.ok()?;
                    match acceptor.accept(stream).await {
                        Ok(stream) => return Some((Ok::<_, std::io::Error>(stream), listener)),
                        Err(error) => failed.send(error.to_string()).ok()?,
                    }
                }
            }
        });
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(Box::pin(incoming)),
        );
        (address, failures)
    }

    #[tokio::test]
    async fn a_worker_trusts_its_own_coordinator_and_no_other() {
        let (address, _failures) = serve().await;
        let authority = Authority::derive(&token(1), RUN).expect("derives");
        let join = Join::new(&address, RUN, token(1), true).expect("makes");
        ask(&join, authority.client_tls())
            .await
            .expect("the right token is served");

        let stranger = Authority::derive(&token(2), RUN).expect("derives");
        let error = ask(&join, stranger.client_tls())
            .await
            .expect_err("another authority");
        assert!(
            error.contains("UnknownIssuer") || error.contains("BadSignature"),
            "{error}"
        );

        let wrong = Join::new(&address, RUN, token(2), true).expect("makes");
        let error = ask(&wrong, authority.client_tls())
            .await
            .expect_err("another token");
        assert!(error.contains("Unauthenticated"), "{error}");
    }

    #[tokio::test]
    async fn a_coordinator_hears_nobody_without_a_certificate_of_its_run() {
        let (address, mut failures) = serve().await;
        let join = Join::new(&address, RUN, token(1), true).expect("makes");
        let own = Authority::derive(&token(1), RUN).expect("derives");
        let trusting = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&own.certificate_pem))
            .domain_name(SERVER_NAME);
        let another = Authority::derive(&token(2), RUN).expect("derives");
        let foreign = Identity::from_pem(&another.member.certificate_pem, &another.member.key_pem);
        // The coordinator's own certificate is of the run, and no member's.
        let server = Identity::from_pem(&own.server.certificate_pem, &own.server.key_pem);
        for (tls, says) in [
            (trusting.clone(), "sent no certificates"),
            (
                trusting.clone().identity(foreign),
                "invalid peer certificate",
            ),
            (trusting.identity(server), "invalid peer certificate"),
        ] {
            ask(&join, tls).await.expect_err("it knows no token");
            let said = failures.recv().await.expect("the server refused");
            assert!(said.contains(says), "{said}");
        }
    }
}

#[test]
fn a_file_of_root_may_be_for_the_group_of_another_user() {
    for (mode, owner, me, exposed) in [
        (0o600, 1000, 1000, false),
        (0o640, 1000, 1000, true),
        (0o440, 0, 65_532, false),
        (0o444, 0, 65_532, true),
        (0o460, 0, 65_532, true),
        (0o440, 0, 0, true),
    ] {
        assert_eq!(
            is_exposed(mode, owner, me),
            exposed,
            "{mode:o} {owner} {me}"
        );
    }
}

#[test]
fn a_seal_is_of_its_words_and_its_secret() {
    let secret = GroupSecret::derive(&token(1), RUN);
    let seal = secret.seal(b"rank 1 of 2");
    assert!(secret.sealed(b"rank 1 of 2", &seal));
    assert!(!secret.sealed(b"rank 0 of 2", &seal));
    assert!(!GroupSecret::derive(&token(2), RUN).sealed(b"rank 1 of 2", &seal));
}
