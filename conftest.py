"""All hooks of the suite are in megaproof/proof/plugin.py, where a wheel has them too."""

pytest_plugins = ["megaproof.proof.plugin"]
