// SPDX-License-Identifier: GPL-2.0
/*
 * Drives the lab's PCI function for tests (tools/pcitest), as a driver of a real device would.
 *
 * In debugfs, pci_test/ADDRESS/do takes a command:
 *
 *   vectors msi|msix MIN MAX [most]  allocate vectors and request them all, or as many as go
 *   free                             give them back
 *   cycle msi|msix COUNT TIMES       both, so many times
 *   fire FIRST COUNT ROUNDS          let the function send vectors, and wait for them
 *   rate FIRST COUNT RATE            let it send them so often in a second; 0 ends that
 *   affinity TIMES SEED              move vectors by turns to CPUs chosen at random, with a rate
 *   pin CPU                          move all vectors to one CPU, each with its next interrupt
 *   check                            compare what was sent with what was received
 *   clear                            begin to count anew
 *   bars                             write and read at both ends of each BAR
 *   read BLOCK LENGTH                read a configuration block
 *   write BLOCK HEX                  write one
 *   invalidated                      what the host has said of changed blocks since the last time
 *
 * result is what the last command has to say, counts has a line for each vector:
 * number, interrupt, sent, and what was received on each CPU.
 *
 * While the parameter hold is set, drivers stay in their probe functions; held says how many.  Then they
 * request a vector and give it back, whatever has happened meanwhile.
 */
#include <linux/atomic.h>
#include <linux/cleanup.h>
#include <linux/debugfs.h>
#include <linux/delay.h>
#include <linux/hex.h>
#include <linux/hyperv.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/percpu.h>
#include <linux/prandom.h>
#include <linux/seq_file.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>

#define REG_ID		0x00
#define MAGIC		0x7e57f00d
#define REG_FIRST	0x08
#define REG_COUNT	0x0c
#define REG_ROUNDS	0x10
#define REG_RATE	0x14
#define REG_BUSY	0x18
#define REG_LOST	0x1c
#define REG_ACKNOWLEDGE	0x20
#define REG_CLEAR	0x24
#define REG_SENT	0x4000
#define REGISTERS_LEN	0x10000

/* The machine may be emulated twice over. */
#define IDLE_MS		60000

/* A probe function is not held for longer. */
#define HOLD_MS		30000

static bool hold;
module_param(hold, bool, 0600);
MODULE_PARM_DESC(hold, "Keep drivers in their probe functions");

static atomic_t held;

static int held_get(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%d\n", atomic_read(&held));
}

static const struct kernel_param_ops held_ops = {
	.get = held_get,
};
module_param_cb(held, &held_ops, NULL, 0400);
MODULE_PARM_DESC(held, "How many drivers are kept there");

static struct dentry *root;

struct test;

struct vector {
	struct test *test;
	u32 index;
};

struct test {
	struct pci_dev *pdev;
	void __iomem *regs;
	struct dentry *dir;
	/* One command at a time. */
	struct mutex lock;
	int allocated;
	int requested;
	struct vector *vectors;
	u32 __percpu *received;
	/* What the host says comes at any time. */
	spinlock_t invalidated_lock;
	int registered;
	unsigned int invalidations;
	u64 invalidated;
	char result[1024];
};

static irqreturn_t interrupt(int irq, void *data)
{
	struct vector *vector = data;
	struct test *test = vector->test;

	this_cpu_inc(test->received[vector->index]);
	/* The function sends the next one after this. */
	writel(vector->index, test->regs + REG_ACKNOWLEDGE);
	return IRQ_HANDLED;
}

static void free_vectors(struct test *test)
{
	while (test->requested > 0) {
		test->requested--;
		free_irq(pci_irq_vector(test->pdev, test->requested),
			 &test->vectors[test->requested]);
	}
	if (test->allocated)
		pci_free_irq_vectors(test->pdev);
	test->allocated = 0;
	free_percpu(test->received);
	test->received = NULL;
	kvfree(test->vectors);
	test->vectors = NULL;
}

static int get_vectors(struct test *test, const char *kind, int min, int max, bool most)
{
	unsigned int flags;
	int i, ret;

	if (test->allocated)
		return -EBUSY;
	if (!strcmp(kind, "msi"))
		flags = PCI_IRQ_MSI;
	else if (!strcmp(kind, "msix"))
		flags = PCI_IRQ_MSIX;
	else
		return -EINVAL;

	ret = pci_alloc_irq_vectors(test->pdev, min, max, flags);
	if (ret < 0 && most) {
		scnprintf(test->result, sizeof(test->result),
			  "allocated=0 requested=0 error=%d\n", ret);
		return 0;
	}
	if (ret < 0)
		return ret;
	test->allocated = ret;
	test->vectors = kvcalloc(test->allocated, sizeof(*test->vectors), GFP_KERNEL);
	test->received = __alloc_percpu(test->allocated * sizeof(u32), sizeof(u32));
	if (!test->vectors || !test->received) {
		free_vectors(test);
		return -ENOMEM;
	}
	writel(1, test->regs + REG_CLEAR);
	for (i = 0; i < test->allocated; i++) {
		test->vectors[i].test = test;
		test->vectors[i].index = i;
		ret = request_irq(pci_irq_vector(test->pdev, i), interrupt, 0,
				  pci_name(test->pdev), &test->vectors[i]);
		if (ret)
			break;
		test->requested++;
	}
	if (ret && !most) {
		free_vectors(test);
		return ret;
	}
	scnprintf(test->result, sizeof(test->result), "allocated=%d requested=%d error=%d\n",
		  test->allocated, test->requested, ret);
	return 0;
}

/* Begins to count anew, as the function does. */
static void clear(struct test *test)
{
	int cpu;

	writel(1, test->regs + REG_CLEAR);
	for_each_possible_cpu(cpu)
		memset(per_cpu_ptr(test->received, cpu), 0, test->requested * sizeof(u32));
}

static int wait_idle(struct test *test)
{
	int waited;
	u32 busy;

	for (waited = 0; waited < IDLE_MS; waited += 5) {
		busy = readl(test->regs + REG_BUSY);
		if (busy == ~0U)
			return -ENODEV;
		if (!busy)
			return 0;
		msleep(5);
	}
	return -ETIMEDOUT;
}

static void order(struct test *test, u32 first, u32 count, u32 reg, u32 value)
{
	writel(first, test->regs + REG_FIRST);
	writel(count, test->regs + REG_COUNT);
	writel(value, test->regs + reg);
}

static int cycle(struct test *test, const char *kind, int count, int times)
{
	int i, ret;

	for (i = 0; i < times; i++) {
		ret = get_vectors(test, kind, count, count, false);
		if (ret) {
			scnprintf(test->result, sizeof(test->result), "times=%d error=%d\n", i, ret);
			return ret;
		}
		free_vectors(test);
		if (signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	scnprintf(test->result, sizeof(test->result), "times=%d\n", i);
	return 0;
}

static int move(struct test *test, int vector, unsigned int cpu)
{
	return irq_set_affinity(pci_irq_vector(test->pdev, vector), cpumask_of(cpu));
}

static u32 received(struct test *test, int vector)
{
	u32 sum = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		sum += per_cpu_ptr(test->received, cpu)[vector];
	return sum;
}

/*
 * The kernel moves an interrupt when it comes the next time.  Until then a further move takes the
 * place of the first: so each vector is waited for before it is moved again.
 */
static int affinity(struct test *test, int times, u32 seed)
{
	int i, vector, waited, moved = 0, refused = 0;
	u32 *seen __free(kvfree) = NULL;
	struct rnd_state random;
	unsigned int cpu;

	if (!test->requested)
		return -ENODEV;
	seen = kvcalloc(test->requested, sizeof(*seen), GFP_KERNEL);
	if (!seen)
		return -ENOMEM;
	for (vector = 0; vector < test->requested; vector++)
		seen[vector] = received(test, vector) - 1;
	prandom_seed_state(&random, seed);
	for (i = 0; i < times; i++) {
		vector = i % test->requested;
		waited = 0;
		while (received(test, vector) == seen[vector]) {
			if (++waited > IDLE_MS / 2 || signal_pending(current))
				return -ETIMEDOUT;
			usleep_range(1000, 2000);
		}
		cpu = cpumask_nth(prandom_u32_state(&random) % num_online_cpus(), cpu_online_mask);
		/* A CPU may have gone offline since. */
		if (cpu >= nr_cpu_ids || move(test, vector, cpu))
			refused++;
		else
			moved++;
		seen[vector] = received(test, vector);
		cond_resched();
	}
	scnprintf(test->result, sizeof(test->result), "moved=%d refused=%d\n", moved, refused);
	return 0;
}

static int pin(struct test *test, unsigned int cpu)
{
	int i, ret;

	if (cpu >= nr_cpu_ids)
		return -EINVAL;
	for (i = 0; i < test->requested; i++) {
		ret = move(test, i, cpu);
		if (ret)
			return ret;
	}
	return 0;
}

static int check(struct test *test)
{
	u64 all_sent = 0, all_received = 0;
	int i, wrong = 0, ret;
	u32 sent, got;

	ret = wait_idle(test);
	if (ret == -ENODEV)
		return ret;
	for (i = 0; i < test->requested; i++) {
		sent = readl(test->regs + REG_SENT + 4 * i);
		got = received(test, i);
		all_sent += sent;
		all_received += got;
		wrong += sent != got;
	}
	scnprintf(test->result, sizeof(test->result),
		  "vectors=%d sent=%llu received=%llu wrong=%d lost=%u idle=%d\n",
		  test->requested, all_sent, all_received, wrong,
		  readl(test->regs + REG_LOST), !ret);
	return 0;
}

/* Where the patterns of a BAR are: at its ends, but not in the registers. */
static bool bar_places(struct test *test, int bar, resource_size_t places[2])
{
	resource_size_t len = pci_resource_len(test->pdev, bar);

	places[0] = bar ? 0 : REGISTERS_LEN;
	places[1] = len - 8;
	return len > places[0];
}

static u64 pattern(int bar, int place)
{
	return 0x0123456789abcdefULL * (2 * bar + place + 1);
}

/* All are written before any is read, so that one BAR in another's place is noticed. */
static int bars(struct test *test, bool verify)
{
	struct pci_dev *pdev = test->pdev;
	resource_size_t places[2];
	int bar, place, len = 0;

	for (bar = 0; bar < PCI_STD_NUM_BARS; bar++) {
		bool good = true;

		if (!pci_resource_len(pdev, bar))
			continue;
		if (!bar)
			good = readl(test->regs + REG_ID) == MAGIC;
		for (place = 0; bar_places(test, bar, places) && place < 2; place++) {
			u64 value = pattern(bar, place);
			void __iomem *at = ioremap(pci_resource_start(pdev, bar) + places[place], 8);

			if (!at)
				return -ENOMEM;
			if (!verify) {
				writel(value, at);
				writel(value >> 32, at + 4);
			} else if (readq(at) != value || readb(at + 7) != (u8)(value >> 56) ||
				   readw(at + 2) != (u16)(value >> 16)) {
				good = false;
			}
			iounmap(at);
		}
		len += scnprintf(test->result + len, sizeof(test->result) - len,
				 "BAR %d: %pa+%#llx%s%s %s\n", bar, &pdev->resource[bar].start,
				 (u64)pci_resource_len(pdev, bar),
				 pci_resource_flags(pdev, bar) & IORESOURCE_MEM_64 ? " 64bit" : "",
				 pci_resource_flags(pdev, bar) & IORESOURCE_PREFETCH ? " pref" : "",
				 good ? "good" : "bad");
	}
	return 0;
}

static void block_invalidated(void *context, u64 mask)
{
	struct test *test = context;

	guard(spinlock_irqsave)(&test->invalidated_lock);
	test->invalidations++;
	test->invalidated |= mask;
}

static void invalidated(struct test *test)
{
	guard(spinlock_irqsave)(&test->invalidated_lock);
	scnprintf(test->result, sizeof(test->result), "registered=%d times=%u mask=%#llx\n",
		  test->registered, test->invalidations, test->invalidated);
	test->invalidations = 0;
	test->invalidated = 0;
}

static void read_block(struct test *test, u32 block, u32 len)
{
	u8 data[2 * HV_CONFIG_BLOCK_SIZE_MAX] = {};
	unsigned int bytes = 0;
	int ret = -E2BIG, at;

	if (len <= sizeof(data))
		ret = hyperv_read_cfg_blk(test->pdev, data, len, block, &bytes);
	at = scnprintf(test->result, sizeof(test->result), "error=%d bytes=%u data=", ret, bytes);
	strscpy(bin2hex(test->result + at, data, min(bytes, len)), "\n", 2);
}

static int write_block(struct test *test, u32 block, const char *hex)
{
	u8 data[2 * HV_CONFIG_BLOCK_SIZE_MAX];
	size_t len = strlen(hex) / 2;
	int ret;

	if (len > sizeof(data) || hex2bin(data, hex, len))
		return -EINVAL;
	ret = hyperv_write_cfg_blk(test->pdev, data, len, block);
	scnprintf(test->result, sizeof(test->result), "error=%d\n", ret);
	return 0;
}

static int command(struct test *test, const char *text)
{
	char word[16] = "", more[8] = "";
	u32 a, b, c;
	int at = 0;

	test->result[0] = 0;
	if (sscanf(text, "vectors %15s %u %u %7s", word, &a, &b, more) >= 3)
		return get_vectors(test, word, a, b, !strcmp(more, "most"));
	if (!strcmp(text, "free")) {
		free_vectors(test);
		return 0;
	}
	if (sscanf(text, "cycle %15s %u %u", word, &a, &b) == 3)
		return cycle(test, word, a, b);
	if (sscanf(text, "fire %u %u %u", &a, &b, &c) == 3) {
		order(test, a, b, REG_ROUNDS, c);
		return wait_idle(test);
	}
	if (sscanf(text, "rate %u %u %u", &a, &b, &c) == 3) {
		order(test, a, b, REG_RATE, c);
		return 0;
	}
	if (sscanf(text, "affinity %u %u", &a, &b) == 2)
		return affinity(test, a, b);
	if (sscanf(text, "pin %u", &a) == 1)
		return pin(test, a);
	if (!strcmp(text, "check"))
		return check(test);
	if (!strcmp(text, "clear")) {
		if (test->requested)
			clear(test);
		return 0;
	}
	if (!strcmp(text, "bars"))
		return bars(test, false) ?: bars(test, true);
	if (sscanf(text, "read %u %u", &a, &b) == 2) {
		read_block(test, a, b);
		return 0;
	}
	if (sscanf(text, "write %u %n", &a, &at) == 1 && at)
		return write_block(test, a, text + at);
	if (!strcmp(text, "invalidated")) {
		invalidated(test);
		return 0;
	}
	return -EINVAL;
}

static ssize_t do_write(struct file *file, const char __user *buf, size_t count, loff_t *offset)
{
	struct test *test = file->private_data;
	char *text __free(kfree) = memdup_user_nul(buf, min(count, PAGE_SIZE));
	int ret;

	if (IS_ERR(text))
		return PTR_ERR(no_free_ptr(text));
	guard(mutex)(&test->lock);
	ret = command(test, strim(text));
	return ret ?: count;
}

static const struct file_operations do_operations = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = do_write,
};

static int result_show(struct seq_file *file, void *unused)
{
	struct test *test = file->private;

	guard(mutex)(&test->lock);
	seq_puts(file, test->result);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(result);

static int counts_show(struct seq_file *file, void *unused)
{
	struct test *test = file->private;
	int i, cpu;

	guard(mutex)(&test->lock);
	for (i = 0; i < test->requested; i++) {
		seq_printf(file, "%d %d %u", i, pci_irq_vector(test->pdev, i),
			   readl(test->regs + REG_SENT + 4 * i));
		for_each_possible_cpu(cpu)
			seq_printf(file, " %u", per_cpu_ptr(test->received, cpu)[i]);
		seq_putc(file, '\n');
	}
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(counts);

static void stay(struct test *test)
{
	int waited;

	atomic_inc(&held);
	for (waited = 0; READ_ONCE(hold) && waited < HOLD_MS; waited += 10)
		msleep(10);
	atomic_dec(&held);
	if (!get_vectors(test, "msix", 1, 1, false))
		free_vectors(test);
}

static int probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct test *test = devm_kzalloc(&pdev->dev, sizeof(*test), GFP_KERNEL);
	int ret;

	if (!test)
		return -ENOMEM;
	test->pdev = pdev;
	mutex_init(&test->lock);
	spin_lock_init(&test->invalidated_lock);
	ret = pcim_enable_device(pdev);
	if (ret)
		return ret;
	pci_set_master(pdev);
	test->regs = devm_ioremap(&pdev->dev, pci_resource_start(pdev, 0), REGISTERS_LEN);
	if (!test->regs)
		return -ENOMEM;
	if (readl(test->regs + REG_ID) != MAGIC)
		return dev_err_probe(&pdev->dev, -ENODEV, "not the function for tests\n");
	if (READ_ONCE(hold))
		stay(test);
	test->registered = hyperv_reg_block_invalidate(pdev, test, block_invalidated);
	pci_set_drvdata(pdev, test);
	test->dir = debugfs_create_dir(pci_name(pdev), root);
	debugfs_create_file("do", 0200, test->dir, test, &do_operations);
	debugfs_create_file("result", 0400, test->dir, test, &result_fops);
	debugfs_create_file("counts", 0400, test->dir, test, &counts_fops);
	return 0;
}

static void remove(struct pci_dev *pdev)
{
	struct test *test = pci_get_drvdata(pdev);

	/* Waits for what is under way in its files. */
	debugfs_remove(test->dir);
	if (!test->registered)
		hyperv_reg_block_invalidate(pdev, NULL, NULL);
	free_vectors(test);
}

static const struct pci_device_id ids[] = {
	{ PCI_DEVICE(PCI_VENDOR_ID_MICROSOFT, 0xfe57) },
	{}
};
MODULE_DEVICE_TABLE(pci, ids);

static struct pci_driver driver = {
	.name = "pci_test",
	.id_table = ids,
	.probe = probe,
	.remove = remove,
};

static int __init pci_test_init(void)
{
	int ret;

	root = debugfs_create_dir("pci_test", NULL);
	ret = pci_register_driver(&driver);
	if (ret)
		debugfs_remove(root);
	return ret;
}
module_init(pci_test_init);

static void __exit pci_test_exit(void)
{
	pci_unregister_driver(&driver);
	debugfs_remove(root);
}
module_exit(pci_test_exit);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Driver of the lab's PCI function for tests");
