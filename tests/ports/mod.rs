//! Ports of the loopback device that stay a test's own: a member that is down comes back to its port, and
//! one that starts finds it free, whatever other tests do meanwhile.
#![allow(dead_code, reason = "not each test binary needs all of it")]

use std::hash::{BuildHasher, RandomState};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::Mutex;

/// A port that is this process's until it ends.
pub fn free_port() -> u16 {
    free_address().port()
}

/// The loopback address with such a port.
pub fn free_address() -> SocketAddr {
    free_listener().local_addr().expect("a bound socket has an address")
}

/// A listener on a port that is this process's until it ends. To close it and bind its port again is no use
/// here: another test that starts a process at that moment shares the socket with its child, until the
/// child's program is loaded.
///
/// It is below those that the system gives to outgoing connections: while a member is down, none of
/// them may take the port that it is to come back to. Other runs of these tests are kept off by the UDP
/// port of the same number, which is held here: members use TCP only.
pub fn free_listener() -> TcpListener {
    static HELD: Mutex<Vec<UdpSocket>> = Mutex::new(Vec::new());
    loop {
        // Each of these has keys of its own.
        let port = 12_000 + (RandomState::new().hash_one(0) % 20_000) as u16;
        let Ok(hold) = UdpSocket::bind(("127.0.0.1", port)) else { continue };
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            HELD.lock().expect("nothing panics with it").push(hold);
            return listener;
        }
    }
}
