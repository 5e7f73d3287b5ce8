//! The one implementation of cryptography that TLS takes in this program.

/// Says that it is ring. To be called before anything that may speak TLS is built: the client of the object stores
/// takes none by itself and panics where none was chosen.
pub fn choose() {
    // The only failure is that one was chosen before.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
