# SPDX-License-Identifier: GPL-2.0
#
# hv_netvsc and hv_pci in Rust, and the lab to try them in.  See "make help".

KDIR		?=
KERNEL		?=
TOOLCHAIN	?=
V		?=

# Where the modules and the lab's programs end up.
BUILD		:= $(CURDIR)/build

export KDIR TOOLCHAIN HYPERV_RUST_CACHE HYPERV_RUST_MIRROR
export HYPERV_RUST_KERNEL := $(KERNEL)

.PHONY: all
all: modules

.PHONY: modules
modules:
	@scripts/build-modules.sh $(BUILD) $(if $(V),V=$(V))

.PHONY: arm64
arm64:
	@scripts/build-modules.sh --arm64 $(BUILD)/arm64 $(if $(V),V=$(V))

.PHONY: tools
tools:
	@scripts/build-tools.sh $(BUILD)

.PHONY: image
image:
	@scripts/lab.sh --prepare

.PHONY: demo
demo: modules tools
	@scripts/lab.sh demo $(ARGS)

.PHONY: lab
lab: modules tools
	@scripts/lab.sh lab $(ARGS)

.PHONY: test check
test check:
	@scripts/test.sh

.PHONY: selftests
selftests: modules tools
	@scripts/lab.sh test selftests-all --output $(BUILD)/selftests $(ARGS)

.PHONY: bench
bench: modules tools
	@scripts/lab.sh bench $(ARGS)

.PHONY: lint
lint:
	@scripts/test.sh --lint

.PHONY: update
update:
	@scripts/kernel-tree.sh --update

.PHONY: install modules_install
install modules_install:
	@scripts/install.sh $(BUILD)

.PHONY: uninstall
uninstall:
	@scripts/install.sh --uninstall

.PHONY: clean
clean:
	rm -rf $(BUILD)

.PHONY: distclean
distclean: clean
	@scripts/clean-cache.sh

.PHONY: help
help:
	@sed -n 's/^#h //p' $(CURDIR)/Makefile

#h Azure accelerated networking drivers in Rust, and a Hyper-V-compatible lab host.
#h
#h   make             build hv_netvsc.ko and hv_pci.ko for Debian's cloud kernel
#h   make demo        see them at work: a VF, host servicing under a live stream (5 minutes)
#h   make lab         a login shell on the guest's console
#h   make test        every check and every scenario, with the Rust and the C drivers
#h   make selftests   the kernel's own tests of network drivers, with both (takes long)
#h   make bench       measure the Rust and the C drivers against each other (ARGS=--help)
#h
#h   make install     install the modules for the running kernel (the way back: make uninstall)
#h   make arm64       build the modules for Debian's arm64 kernel, into build/arm64 (not run anywhere)
#h   make tools       build the lab host, build/hvlab
#h   make image       make the guest image
#h   make lint        only the checks that need no virtual machine
#h   make update      look for a newer 7.2 kernel now (it is looked for once a week)
#h   make clean       remove build/
#h   make distclean   and the cache folder's contents: build root, kernel trees, images
#h
#h Variables:
#h   KDIR=FOLDER      build for this prepared kernel tree
#h   KERNEL=RELEASE   build for this release of Debian's kernel, not the newest 7.2
#h   TOOLCHAIN=host   with KDIR: use this machine's tools, not the build root's
#h   V=1              show commands
#h   ARGS=...         arguments for the lab (make lab ARGS=--help)
#h   HYPERV_RUST_CACHE=FOLDER   instead of /var/cache/hyperv-rust
#h   HYPERV_RUST_MIRROR=URL     a Debian mirror, instead of the one of this machine's apt
