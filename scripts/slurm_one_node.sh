#!/usr/bin/env bash
# A Slurm of one node on this machine, to try `mtrl-sweep --backend slurm` (root; Debian: apt install slurm-wlm munge).
#
#     scripts/slurm_one_node.sh start DIR [CPUS] && export SLURM_CONF=DIR/slurm.conf
#     scripts/slurm_one_node.sh stop DIR
set -euo pipefail

action=$1 dir=$(realpath -m "$2")

start() {
    local cpus=${1:-$(nproc)} host
    host=$(hostname -s)
    mkdir -p "$dir"/{state,spool} /run/munge
    chown munge: /run/munge
    # The key and the daemon are the machine's, if it has them.
    [ -e /etc/munge/munge.key ] || { head -c 1024 /dev/urandom >/etc/munge/munge.key && chmod 600 /etc/munge/munge.key && chown munge: /etc/munge/munge.key; }
    munge -n >/dev/null 2>&1 || { setpriv --reuid munge --regid munge --clear-groups munged --force; touch "$dir/munged.ours"; }
    cat >"$dir/slurm.conf" <<CONF
ClusterName=here
SlurmctldHost=$host
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
# No control groups: a container may not have them.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
KillWait=30
MinJobAge=300
# A job that goes back into the queue waits as long as its credential lives, 2 minutes by default.
AuthInfo=cred_expire=5
SchedulerParameters=sched_interval=2,sched_min_interval=0
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus State=UNKNOWN
PartitionName=here Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF=$dir/slurm.conf
    slurmctld
    slurmd
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ] && return
        sleep 1
    done
    sinfo >&2
    return 1
}

stop() {
    local name
    for name in slurmd slurmctld; do
        [ ! -e "$dir/$name.pid" ] || kill "$(cat "$dir/$name.pid")" || true
    done
    [ ! -e "$dir/munged.ours" ] || kill "$(cat /run/munge/munged.pid)" || true
}

"$action" "${@:3}"
