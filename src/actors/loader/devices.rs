//! The devices: which programs hang at, and what the programs are told of each.

use std::collections::BTreeMap;
use std::net::IpAddr;

use kinesin_abi::{Addr, DEVICE_ACROSS, DEVICE_ETHERNET, DEVICE_POD, DEVICE_SERVED, DEVICE_XDP, DeviceValue};
use kinesin_core::devices::Device;

use super::Loader;
use crate::actor::Failure;
use crate::world::Devices;

impl Loader {
    /// Attaches to the devices that are served, and to pods' where packets go straight; returns how many entries of the devices
    /// map were written or deleted.
    pub(super) fn follow_devices(&mut self, devices: &Devices) -> Result<usize, Failure> {
        let written = self.write_devices(devices)?;
        let wanted: BTreeMap<_, _> = devices.selected().map(|device| (device.ifindex, device.name.clone())).collect();
        for (ifindex, name) in self.attached.iter().filter(|(ifindex, _)| !wanted.contains_key(ifindex)) {
            match self.loaded.datapath().detach_device(name, *ifindex) {
                Ok(()) => tracing::info!(device = %name, "programs detached"),
                Err(error) => tracing::error!(device = %name, %error, "programs not detached"),
            }
        }
        for (ifindex, name) in &wanted {
            if self.attached.get(ifindex) == Some(name) {
                continue;
            }
            match self.loaded.datapath().attach_device(name, *ifindex) {
                Ok(hooks) if hooks.are_ok() => {
                    tracing::info!(device = %name, "programs attached")
                }
                Ok(_) => tracing::error!(device = %name, "programs attached in part; see kinesin status"),
                // One device must not take the others down (R34); the hook's status carries the error.
                Err(error) => tracing::error!(device = %name, %error, "programs not attached"),
            }
        }
        self.attached = wanted;
        let routing = self.world.host_routing();
        let pods = devices.pods().map(|device| device.ifindex).filter(|ifindex| routing.goes_straight(*ifindex));
        self.loaded.datapath().follow_pods(&pods.collect());
        // Only now is it known which drivers send what they are handed; that is news, not a difference.
        self.driven = self.loaded.datapath().accelerated();
        self.write_devices(devices)?;
        Ok(written)
    }

    /// Returns how many entries of the devices map were written or deleted.
    fn write_devices(&self, devices: &Devices) -> Result<usize, Failure> {
        let routing = self.world.host_routing();
        let value = |device: &Device| {
            let mut value = device_value(device);
            value.flags |= if self.driven.contains(&device.ifindex) { DEVICE_XDP } else { 0 };
            let through = routing.goes_straight(device.ifindex);
            value.flags |= if through && devices.is_of_pod(device) { DEVICE_POD } else { 0 };
            let served = devices.selected.contains(&device.ifindex) && device.mac.is_some();
            value.flags |= if served { DEVICE_SERVED } else { 0 };
            value.flags |= if through && served && device.leads_across() { DEVICE_ACROSS } else { 0 };
            (device.ifindex, value)
        };
        let room = self.options.sizes.devices as usize;
        let fitting = most_needed(devices, room);
        let left_out = devices.all.len() - fitting.len();
        let problem = || {
            format!(
                "{left_out} devices are not in the map, which holds {room}: packets to pods behind them go by the host's stack"
            )
        };
        self.world.problems.set("devices-map", (left_out > 0).then(problem).into_iter().collect());
        let values: BTreeMap<_, _> = fitting.into_iter().map(value).collect();
        let before: BTreeMap<_, _> = self.loaded.store.read_devices()?.into_iter().collect();
        let mut written = 0;
        // First, so that there is room.
        for ifindex in before.keys().filter(|ifindex| !values.contains_key(ifindex)) {
            self.loaded.store.delete_device(*ifindex)?;
            written += 1;
        }
        for (ifindex, value) in values.iter().filter(|(ifindex, value)| before.get(ifindex) != Some(value)) {
            self.loaded.store.put_device(*ifindex, value)?;
            written += 1;
        }
        Ok(written)
    }
}

/// What the programs need to know of a device: its MAC and the addresses that translated packets may carry.
fn device_value(device: &Device) -> DeviceValue {
    let global = |v6: &std::net::Ipv6Addr| !v6.is_loopback() && v6.segments()[0] & 0xffc0 != 0xfe80;
    let addresses = || device.addresses.iter().map(|net| net.addr());
    let ipv4 = addresses().find_map(|ip| match ip {
        IpAddr::V4(v4) => Some(Addr::from(v4).v4_raw()),
        IpAddr::V6(_) => None,
    });
    let ipv6 = addresses().find_map(|ip| match ip {
        IpAddr::V6(v6) if global(&v6) => Some(Addr::from(v6)),
        _ => None,
    });
    let mac = device.mac.filter(|_| !device.is_loopback);
    DeviceValue {
        mac: mac.unwrap_or_default(),
        flags: if mac.is_some() { DEVICE_ETHERNET } else { 0 },
        ipv4: ipv4.unwrap_or_default(),
        ipv6: ipv6.unwrap_or_default(),
    }
}

/// As many devices as there is room for: those that we serve before those that lend their address to packets that leave by
/// them, and these before pods'.
fn most_needed(devices: &Devices, room: usize) -> Vec<&Device> {
    let mut all: Vec<&Device> = devices.all.iter().collect();
    all.sort_by_key(|device| (!devices.selected.contains(&device.ifindex), device.addresses.is_empty()));
    all.truncate(room);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_the_map_is_small_devices_that_are_served_come_first_and_pods_last() {
        let device = |ifindex, address: Option<&str>| Device {
            ifindex,
            addresses: address.into_iter().map(|address| address.parse().expect("valid")).collect(),
            ..Device::default()
        };
        let all =
            vec![device(1, Some("127.0.0.1/8")), device(2, None), device(3, None), device(4, Some("10.0.0.4/24"))];
        let devices = Devices { all, selected: vec![3] };
        let chosen = |room| most_needed(&devices, room).iter().map(|device| device.ifindex).collect::<Vec<_>>();
        assert_eq!(chosen(9), [3, 1, 4, 2]);
        assert_eq!(chosen(2), [3, 1]);
        assert_eq!(chosen(0), [0u32; 0]);
    }
}
