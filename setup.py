import os

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildTyped(build_py):
    """Install the module a second time as stubs: mypy takes no py.typed from a lone module (PEP 561)."""

    def run(self):
        super().run()
        os.makedirs(os.path.dirname(self.stubs()), exist_ok=True)
        self.copy_file('etcetera.py', self.stubs())

    def stubs(self):
        return os.path.join(self.build_lib, 'etcetera-stubs', '__init__.pyi')

    def get_outputs(self, *args, **kwargs):
        return super().get_outputs(*args, **kwargs) + [self.stubs()]


setup(cmdclass={'build_py': BuildTyped})
