//! Who may see what: the page's key in a header or in a cookie that the link has left, or the token in a header.

use hyper::StatusCode;
use hyper::header::{self, HeaderMap, HeaderValue};

use super::{Answer, Site, plain};

impl Site {
    /// Whether a request shows the run's token or the page's key.
    pub(super) fn admits(&self, headers: &HeaderMap) -> bool {
        let shown = headers
            .get(header::AUTHORIZATION)
            .map(HeaderValue::as_bytes);
        let mut cookies = headers.get_all(header::COOKIE).iter();
        self.token.admits(shown)
            || shown.is_some_and(|shown| self.key_in_bearer(shown))
            || cookies.any(|cookie| self.key_in_cookie(cookie.as_bytes()))
    }

    /// What a scraper shows, which has no cookies and should not have the token.
    fn key_in_bearer(&self, header: &[u8]) -> bool {
        let key = header.strip_prefix(b"Bearer ");
        key.is_some_and(|key| self.key.admits(key))
    }

    fn key_in_cookie(&self, header: &[u8]) -> bool {
        let name = self.cookie_name();
        header.split(|&byte| byte == b';').any(|pair| {
            let value = pair.trim_ascii().strip_prefix(name.as_bytes());
            let value = value.and_then(|rest| rest.strip_prefix(b"="));
            value.is_some_and(|value| self.key.admits(value))
        })
    }

    pub(super) fn key_in_query(&self, query: Option<&str>) -> bool {
        let mut pairs = query.unwrap_or_default().split('&');
        pairs.any(|pair| {
            let key = pair.strip_prefix("key=");
            key.is_some_and(|key| self.key.admits(key.as_bytes()))
        })
    }

    /// Leaves the key in a cookie, and sends the browser on to the page without it.
    pub(super) fn remember(&self) -> Answer {
        let secure = if self.secure { "; Secure" } else { "" };
        let cookie = format!(
            "{}={}; HttpOnly; SameSite=Strict; Path=/{secure}",
            self.cookie_name(),
            self.key.reveal()
        );
        let mut answer = plain(StatusCode::SEE_OTHER, "");
        let headers = answer.headers_mut();
        if let Ok(mut cookie) = HeaderValue::try_from(cookie) {
            cookie.set_sensitive(true);
            headers.insert(header::SET_COOKIE, cookie);
        }
        headers.insert(header::LOCATION, HeaderValue::from_static("/"));
        answer
    }

    /// A browser has one set of cookies for all ports of a host, and runs may share one.
    fn cookie_name(&self) -> String {
        format!("distillery-{}", self.identity.run_id)
    }
}
