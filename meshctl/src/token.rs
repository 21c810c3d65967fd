//! `token`: what a node needs to join. It is a file of the control service, readable by root only.

use anyhow::Context as _;
use mesh_model::join::JoinToken;

use crate::cli::TokenArgs;

/// `meshctl token`.
pub(crate) fn token(args: TokenArgs) -> anyhow::Result<()> {
    let path = args.data_dir.join("join-token");
    let text = std::fs::read_to_string(&path).with_context(|| {
        format!("read {} (run this where mesh-control runs, or give --data-dir)", path.display())
    })?;
    let token: JoinToken = text.parse().with_context(|| format!("{}", path.display()))?;
    println!("{token}");
    Ok(())
}
