use super::*;
use distillery_common::security::Token;
use distillery_common::task::FailureClass;

fn of(variables: &[(&str, &str)]) -> Secrets {
    let owned = variables.iter();
    Secrets::of(owned.map(|&(name, value)| (name.to_owned(), value.to_owned())))
}

/// With `variables`, none of `said` is shown.
fn check_hidden(variables: &[(&str, &str)], said: &[&str]) {
    let secrets = of(variables);
    for said in said {
        let line = format!("before {said} after");
        let shown = secrets.shown(&mut line.clone().into_bytes(), false);
        assert_eq!(shown, "before ••• after", "{line:?}");
    }
}

#[test]
fn values_of_secret_variables_are_hidden() {
    let secrets = of(&[
        ("AWS_SECRET_ACCESS_KEY", "abcdefgh12345678"),
        ("DISTILLERY_TOKEN", "0123456789abcdef"),
        ("HF_TOKEN", "short"),
        ("HOME", "/home/somebody"),
        ("OLDPWD", "/home/somebody/else"),
    ]);
    assert_eq!(
        secrets.hidden_in("0123456789abcdef: abcdefgh12345678 short /home/somebody/else"),
        "•••: ••• short /home/somebody/else"
    );
    assert_eq!(format!("{secrets:?}"), "Secrets(2)");
}

#[test]
fn names_that_used_to_be_overlooked_are_secret() {
    for name in [
        "SSH_PASSPHRASE",
        "wandb_apikey",
        "OPENAI_API_KEY",
        "MYSQL_PASSWD",
        "DB_PASS",
        "OTEL_EXPORTER_OTLP_HEADERS",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_SAS",
    ] {
        check_hidden(
            &[(name, "correct horse battery")],
            &["correct horse battery"],
        );
    }
}

#[test]
fn parts_of_headers_and_connection_strings_are_hidden() {
    check_hidden(
        &[(
            "OTEL_EXPORTER_OTLP_HEADERS",
            "authorization=Bearer%20abcDEF0123456789,x-tenant=four-seasons",
        )],
        &[
            "abcDEF0123456789",
            "Bearer abcDEF0123456789",
            "four-seasons",
        ],
    );
    let azure = "DefaultEndpointsProtocol=https;AccountName=storage;AccountKey=q0/+Zm9vYmFyYmF6cXV4==;EndpointSuffix=core.windows.net";
    let variables = [("AZURE_STORAGE_CONNECTION_STRING", azure)];
    check_hidden(&variables, &["q0/+Zm9vYmFyYmF6cXV4==", azure]);
    let shown = of(&variables).hidden_in("core.windows.net");
    assert_eq!(shown, "core.windows.net", "a place is no secret");
}

#[test]
fn the_password_of_a_url_is_hidden_and_its_place_is_not() {
    let variables = [
        ("HTTPS_PROXY", "http://somebody:p%40ssw0rd@proxy:3128"),
        ("no_proxy", "localhost,127.0.0.1"),
        ("http_proxy", "me:pw@proxy:3128"),
        ("DATABASE_URL", "postgres://app:correcthorse@db/x?y=@z"),
    ];
    let secrets = of(&variables);
    for (said, shown) in [
        (
            "via http://somebody:p%40ssw0rd@proxy:3128",
            "via http://•••@proxy:3128",
        ),
        ("password p@ssw0rd", "password •••"),
        ("via me:pw@proxy:3128", "via •••proxy:3128"),
        ("db app:correcthorse", "db •••"),
        ("correcthorse", "•••"),
        (
            "proxy:3128 localhost,127.0.0.1",
            "proxy:3128 localhost,127.0.0.1",
        ),
    ] {
        assert_eq!(secrets.hidden_in(said), shown);
    }
}

#[test]
fn names_without_a_password_and_places_of_secrets_are_shown() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let path = file.path().to_str().expect("text");
    let token = "ghp_0123456789abcdefghij";
    let secrets = of(&[
        ("REMOTE", "ssh://distillery@host/repository"),
        ("OTHER_REMOTE", &format!("https://{token}@host/repository")),
        ("GOOGLE_APPLICATION_CREDENTIALS", path),
        ("A_TOKEN_FILE", "/nonexistent/token"),
    ]);
    for shown in ["distillery@host", path] {
        assert_eq!(secrets.hidden_in(shown), shown);
    }
    assert_eq!(secrets.hidden_in(token), "•••");
    assert_eq!(secrets.hidden_in("/nonexistent/token"), "•••", "may be one");
}

#[test]
fn a_value_of_several_lines_is_hidden_line_by_line() {
    let key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkq\nhkiG9w0BAQEFAASC\n-----END PRIVATE KEY-----\n";
    let variables = [("TLS_PRIVATE_KEY", key)];
    check_hidden(&variables, &["MIIEvQIBADANBgkq", "hkiG9w0BAQEFAASC"]);
    let quoted = serde_json::Value::from(key).to_string();
    check_hidden(&variables, &[quoted.trim_matches('"')]);
    // A key file whose key has its lines in JSON's way.
    let file = serde_json::json!({"type": "service_account", "private_key": key}).to_string();
    let variables = [("GOOGLE_SERVICE_ACCOUNT_KEY", file.as_str())];
    check_hidden(&variables, &[&file, "MIIEvQIBADANBgkq", "hkiG9w0BAQEFAASC"]);
    assert_eq!(
        of(&variables).hidden_in("service_account"),
        "service_account"
    );
}

#[test]
fn a_secret_is_hidden_in_every_way_that_it_may_be_written() {
    let secret = "a\"b\\c/d+e=ü\tf";
    let json = serde_json::Value::from(secret).to_string();
    let twice = serde_json::Value::from(json.trim_matches('"')).to_string();
    let debug = format!("{secret:?}");
    let inner = |quoted: &str| quoted[1..quoted.len() - 1].to_owned();
    check_hidden(
        &[("MY_SECRET", secret)],
        &[
            secret,
            &inner(&json),
            &inner(&twice),
            &inner(&debug),
            "a\\\"b\\\\c/d+e=\\u00fc\\tf",
            "a%22b%5Cc%2Fd%2Be%3D%C3%BC%09f",
            "a%22b%5Cc/d%2Be%3D%C3%BC%09f",
            // A terminal's colours in its midst.
            "a\"b\\c/d\u{1b}[31m+e=ü\tf",
        ],
    );
}

#[test]
fn a_token_that_was_read_from_a_file_is_hidden() {
    let secrets = of(&[]);
    let token = Token::generate().expect("random");
    let join = Join::new("127.0.0.1:4000", "run", token, true).expect("a join string");
    secrets.learn(&join);
    let token = join.token().reveal();
    let said = [join.reveal(), token.clone(), token.to_uppercase()].join(" ");
    assert_eq!(secrets.hidden_in(&said), "••• ••• •••");
    assert_eq!(secrets.hidden_in(&join.to_string()), join.to_string());
    let failure = Failure {
        class: FailureClass::Unknown,
        message: format!("it says {token}"),
    };
    assert_eq!(secrets.hidden_in_failure(failure).message, "it says •••");
}

#[test]
fn secrets_that_overlap_are_hidden_whole() {
    let secrets = of(&[("A_TOKEN", "abcdefghij"), ("B_TOKEN", "ghijklmnop")]);
    assert_eq!(secrets.hidden_in("x abcdefghijklmnop y"), "x ••• y");
    assert_eq!(secrets.hidden_in("abcdefghijghijklmnop"), "••••••");
}

/// Wherever a line is cut, both halves together show nothing of the secrets on either side of the cut.
#[test]
fn no_cut_leaves_a_secret_in_halves() {
    let secrets = of(&[("A_TOKEN", "abcdefghij"), ("B_TOKEN", "ghijklmnop")]);
    let line = "..abcdefghijklmnop..ghijklmnop..abcdefghij..";
    let whole = secrets.hidden_in(line).replace("•••", "");
    for at in 0..=line.len() {
        let mut bytes = line.as_bytes()[..at].to_vec();
        let first = secrets.shown(&mut bytes, true);
        bytes.extend(&line.as_bytes()[at..]);
        let rest = secrets.shown(&mut bytes, false);
        assert!(bytes.is_empty());
        let shown = [first, rest].concat().replace("•••", "");
        assert_eq!(shown, whole, "cut at {at}");
    }
}
