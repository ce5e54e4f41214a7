//! One call by the runtime: what it asks, what it gave, and the ways to the kernel and the lease store.

use crate::boot::BootId;
use crate::config::Network;
use crate::error::{Code, Error};
use crate::kernel::HostKernel;
use crate::netlink::{Protocol, Socket};
use crate::request::Container;
use crate::store::{self, Locked, Missing, Store};

/// All that a verb works with.
pub struct Call {
    /// Container, namespace, interface; empty for verbs without.
    pub container: Container,
    /// The configuration.
    pub network: Network,
    /// Standard input as it came, for delegated plugins.
    pub input: Vec<u8>,
    /// `CNI_PATH`: where delegated plugins are.
    pub plugin_path: String,
    /// The kernel, from the host's namespace.
    pub kernel: HostKernel,
    /// This boot.
    pub boot: BootId,
}

impl Call {
    /// Opens the ways to the kernel.
    pub fn new(
        container: Container,
        network: Network,
        input: Vec<u8>,
        plugin_path: String,
    ) -> Result<Call, Error> {
        let boot = BootId::read().map_err(|e| Error::because(Code::Io, "cannot read the boot id", e))?;
        let kernel = HostKernel::new(Socket::open(Protocol::Route)?);
        let kernel = kernel.with_state_of_others(&network.state_of_others);
        let kernel = kernel.with_bridges(network.bridges.clone());
        Ok(Call { container, network, input, plugin_path, kernel, boot })
    }

    /// Locks the lease store, making it if it is missing.
    pub fn lock(&mut self) -> Result<Locked<'_>, Error> {
        let store = self.lock_store(Missing::Create)?;
        store.ok_or_else(|| Error::new(Code::Internal, "the lease store is missing"))
    }

    /// Locks the lease store; `None` if there is none.
    pub fn lock_existing_store(&mut self) -> Result<Option<Locked<'_>>, store::Error> {
        self.lock_store(Missing::Leave)
    }

    fn lock_store(&mut self, missing: Missing) -> Result<Option<Locked<'_>>, store::Error> {
        let store = Store::at(&self.network.leases);
        store.lock(&self.boot, self.network.lock_timeout, missing, &mut self.kernel)
    }

    /// The socket into the host's namespace.
    pub fn host(&mut self) -> &mut Socket {
        self.kernel.route()
    }
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Error {
        use store::Error::*;
        let code = match error {
            Busy { .. } | Newer { .. } | Rebuild { .. } => Code::TryAgain,
            Io { .. } => Code::Io,
            Full(_) => Code::Exhausted,
            Encode(_) => Code::Config,
        };
        Error::because(code, "cannot use the lease store", error)
    }
}
