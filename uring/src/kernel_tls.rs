//! TLS of one lane in the kernel: after the handshake the socket seals and opens by itself.
//!
//! Then every way of moving parcels works as without TLS, but for sending without a copy. The keys
//! leave rustls for the kernel and are wiped here. The kernel does not change keys by itself, so a
//! lane may not carry more than its cipher bears: the source sees to it by choosing the cipher
//! ([`crate::plan::LaneTls`]).

use std::net::TcpStream;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use rustls::{Connection, ConnectionTrafficSecrets};

/// `TLS_1_3_VERSION` and the ciphers of linux/tls.h.
const TLS_1_3: u16 = 0x0304;

/// Whether this kernel's sockets do TLS: once the protocol is set, the connection has to be handed
/// over by [`install`].
pub(crate) fn prepare(socket: &TcpStream) -> Result<(), Errno> {
    setsockopt(socket, sockopt::TcpUlp::default(), b"tls")
}

/// Hands a connection's keys to the kernel. Nothing that was received may be left in it.
pub(crate) fn install(socket: &TcpStream, tls: Connection) -> std::io::Result<()> {
    let secrets = tls.dangerous_extract_secrets().map_err(std::io::Error::other)?;
    let (sends, receives) = (crypto(secrets.tx)?, crypto(secrets.rx)?);
    setsockopt(socket, sockopt::TcpTlsTx, &sends)?;
    setsockopt(socket, sockopt::TcpTlsRx, &receives)?;
    Ok(())
}

fn crypto(
    (sequence, secrets): (u64, ConnectionTrafficSecrets),
) -> std::io::Result<sockopt::TlsCryptoInfo> {
    let rec_seq = sequence.to_be_bytes();
    let info = |cipher_type| libc::tls_crypto_info { version: TLS_1_3, cipher_type };
    Ok(match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => {
            let (salt, iv) = split(iv.as_ref());
            sockopt::TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
                info: info(libc::TLS_CIPHER_AES_GCM_128),
                iv,
                key: key.as_ref().try_into().expect("16 bytes"),
                salt,
                rec_seq,
            })
        }
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => {
            let (salt, iv) = split(iv.as_ref());
            sockopt::TlsCryptoInfo::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 {
                info: info(libc::TLS_CIPHER_AES_GCM_256),
                iv,
                key: key.as_ref().try_into().expect("32 bytes"),
                salt,
                rec_seq,
            })
        }
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
            sockopt::TlsCryptoInfo::Chacha20Poly1305(libc::tls12_crypto_info_chacha20_poly1305 {
                info: info(libc::TLS_CIPHER_CHACHA20_POLY1305),
                iv: iv.as_ref().try_into().expect("12 bytes"),
                key: key.as_ref().try_into().expect("32 bytes"),
                salt: [],
                rec_seq,
            })
        }
        _ => return Err(Errno::EOPNOTSUPP.into()),
    })
}

/// A nonce as the kernel has it: four bytes of salt, eight of the rest.
fn split(iv: &[u8]) -> ([u8; 4], [u8; 8]) {
    let (salt, rest) = iv.split_at(4);
    (salt.try_into().expect("4 bytes"), rest.try_into().expect("8 bytes"))
}
