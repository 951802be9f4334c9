"""All hooks of the suite are in megaproof/proof/plugin.py, where a wheel has them too."""

if __name__ == "megaproof.conftest":
    raise ImportError("megaproof.conftest is pytest's file of a checkout: import megaproof.proof.plugin")

pytest_plugins = ["megaproof.proof.plugin"]
