#!/bin/bash
# A slice of eight TPU v5e chips: configs/launch/tpu_vm.sh NAME ZONE gs://BUCKET
# Makes it, installs jmlp on its hosts and trains on all of them at once; `gcloud ... delete NAME` ends
# the bill. jax finds the other hosts by itself. Mount the bucket (gcsfuse) where run directories go.
set -euo pipefail
name=$1 zone=$2 bucket=$3
on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

gcloud compute tpus tpu-vm create "$name" --zone="$zone" \
  --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite
gcloud compute tpus tpu-vm scp --recurse . "$name":jmlp --zone="$zone" --worker=all
on_all "cd jmlp && pip install -e '.[tpu]' && mkdir -p ~/runs && gcsfuse ${bucket#gs://} ~/runs"
on_all "cd jmlp && JMLP_DATA=~/runs/data jmlp train configs/tpu_slice.yaml --run-dir ~/runs/first"
