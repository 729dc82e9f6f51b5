"""An optional signature over all files of a release, with OpenSSF's `model-signing` (an extra)."""

from pathlib import Path

from pmp_ds.errors import UserError
from pmp_ds.release.allow_list import SIGNATURE_FILE


def sign(folder: Path, key: Path) -> None:
    """Write ``folder``/model.sig with the private elliptic-curve key of a PEM file.

    Checked with `model_signing verify key FOLDER --signature FOLDER/model.sig --public_key FILE`.
    Raises UserError when the extra or the key is missing, or the key is not a private key.
    """
    require_signing(key)
    from model_signing import hashing, signing

    target = folder / SIGNATURE_FILE
    hashes = hashing.Config().set_ignored_paths(paths=[target], ignore_git_paths=False)
    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=key)
        signer.set_hashing_config(hashes).sign(folder, target)
    except ValueError as error:
        raise UserError(f"--sign {key} is not a usable private key: {error}") from None


def require_signing(key: Path) -> None:
    """Raise UserError before an export that would take minutes."""
    try:
        import model_signing  # noqa: F401
    except ImportError:
        raise UserError(
            "--sign needs the extra `sign`: pip install 'pmp_ds[sign]', or omit --sign"
        ) from None
    if not key.is_file():
        raise UserError(f"--sign {key}: no such file")
